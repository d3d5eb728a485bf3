"""Upstream's names for sharded modules and their checkpoints, on torch's public ``fully_shard`` (FSDP2).

Training does not use them: its parallelism is in ``parallel.py``, its checkpoints in ``train/checkpoint.py``. They are
for scripts that import them from upstream, and require fvcore as upstream does. In a single process nothing is sharded
and everything works on plain modules.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from iopath.common.file_io import PathManager
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as ShardedGradScaler

from dinov2_custom import distributed
from dinov2_custom.errors import CheckpointError, ConfigError, optional
from dinov2_custom.files import write_text
from dinov2_custom.sharding import reduce_dtype
from dinov2_custom.train.teacher_file import save_atomically
from dinov2_custom.utils.dtype import resolve_dtype
from dinov2_custom.utils.weights import read_weights

logger = logging.getLogger("dinov2")
Checkpointer = optional("fvcore.common.checkpoint", "dinov2.fsdp").Checkpointer
# a section's sharding_strategy -> fully_shard's reshard_after_forward
_RESHARD = {"auto": False, "SHARD_GRAD_OP": False, "FULL_SHARD": True}


def get_fsdp_wrapper(
    model_cfg: Any, modules_to_wrap: Iterable[type[nn.Module]] = ()
) -> Callable[[nn.Module], nn.Module]:
    """Return a function that shards a module in place over all processes and returns it; a no-op in a single one.

    Args:
        model_cfg: a section such as ``cfg.compute_precision.student.backbone``.
        modules_to_wrap: classes whose instances become separate units.

    Raises:
        ConfigError: several processes with a ``sharding_strategy`` that does not shard.
    """
    strategy, precision = model_cfg.sharding_strategy, model_cfg.mixed_precision
    classes = tuple(modules_to_wrap)

    def wrap(module: nn.Module) -> nn.Module:
        if distributed.get_global_size() == 1:
            return module
        if strategy not in _RESHARD:
            raise ConfigError(
                f"sharding_strategy: expected one of {', '.join(_RESHARD)} to shard a module, got {strategy}; for "
                "whole copies use torch.nn.parallel.DistributedDataParallel"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = resolve_dtype(precision.param_dtype, device)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=reduce_dtype(precision.reduce_dtype, dtype),
        )
        options = {
            "mesh": torch.distributed.device_mesh.init_device_mesh(device, (distributed.get_global_size(),)),
            "mp_policy": policy,
            "reshard_after_forward": _RESHARD[strategy],
        }
        inner = [child for child in module.modules() if child is not module and isinstance(child, classes)]
        for child in [*reversed(inner), module]:
            fully_shard(child, **options)
        return module

    return wrap


def is_fsdp(x: nn.Module) -> bool:
    """Return whether ``x`` itself is a sharded unit."""
    return isinstance(x, FSDPModule)


def is_sharded_fsdp(x: nn.Module) -> bool:
    """Return the same as :func:`is_fsdp`: every unit of FSDP2 is sharded."""
    return is_fsdp(x)


def free_if_fsdp(x: nn.Module) -> None:
    """Free the gathered parameters of ``x`` if it is a sharded unit."""
    if is_fsdp(x):
        x.reshard()


def get_fsdp_modules(x: nn.Module) -> list[nn.Module]:
    """Return the sharded units in ``x``, itself included, outer ones first."""
    return [module for module in x.modules() if is_fsdp(module)]


def reshard_fsdp_model(x: nn.Module) -> None:
    """Free all gathered parameters in ``x``."""
    for module in get_fsdp_modules(x):
        free_if_fsdp(module)


def rankstr() -> str:
    """Return ``rank_<r>``."""
    return f"rank_{distributed.get_global_rank()}"


class _SharedFiles(PathManager):
    """Let only the main process remove a file, which all processes share."""

    def rm(self, path: str) -> None:
        if distributed.is_main_process():
            super().rm(path)


class FSDPCheckpointer(Checkpointer):
    """fvcore's Checkpointer for models that may be sharded: a single file, which any number of processes can read.

    Takes the same arguments as fvcore's (``save_to_disk=False`` saves nothing) and works with ``PeriodicCheckpointer``.
    It does not read upstream's files, which hold one rank's shards each and need unpickling.
    """

    def __init__(self, model: nn.Module, save_dir: str | os.PathLike = "", **kwargs: Any) -> None:
        super().__init__(model, str(save_dir), **kwargs)
        self.path_manager = _SharedFiles()

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth``; all ranks must call it, the first writes. ``kwargs`` are stored too."""
        if not self.save_dir or not self.save_to_disk:
            return
        whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {"model": dcp.get_model_state_dict(self.model, options=whole), **kwargs}
        for key, part in self.checkpointables.items():
            if isinstance(part, torch.optim.Optimizer):
                state[key] = dcp.get_optimizer_state_dict(self.model, part, options=whole)
            else:
                state[key] = part.state_dict()
        if distributed.is_main_process():
            save_atomically(state, Path(self.save_dir) / f"{name}.pth")
            self.tag_last_checkpoint(f"{name}.pth")
        distributed.barrier()

    def load(self, path: str | os.PathLike, checkpointables: Iterable[str] | None = None) -> dict[str, Any]:
        """Restore the model, and ``checkpointables`` (None for all), from ``path``; return the file's other values.

        Raises:
            CheckpointError: the file was not written by :meth:`save`, or does not fit the model.
        """
        if not path:
            return {}
        state = read_weights(path)
        if not isinstance(state, Mapping) or "model" not in state:
            raise CheckpointError(
                f"expected a file that FSDPCheckpointer.save wrote, got one without the key model: {path}; check the "
                "path"
            )
        whole = dcp.StateDictOptions(full_state_dict=True)
        try:
            dcp.set_model_state_dict(self.model, state.pop("model"), options=whole)
        except (RuntimeError, ValueError) as e:
            raise CheckpointError(
                f"expected the tensors of {type(self.model).__name__} in {path}, got others ({e}); build the model "
                "that was saved"
            ) from e
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key not in state:
                logger.warning(f"{path}: no state of {key}, which is unchanged")
            elif isinstance(part := self.checkpointables[key], torch.optim.Optimizer):
                dcp.set_optimizer_state_dict(self.model, part, state.pop(key), options=whole)
            else:
                part.load_state_dict(state.pop(key))
        return state

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record the file that :meth:`get_checkpoint_file` returns."""
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)
