"""Gather the teacher of a facebookresearch/dinov2 run from the files written by its processes.

Each file holds one process's part of every FSDP unit: the unit's flat parameter as a ShardedTensor and, as upstream
uses ``use_orig_params``, the pieces of each parameter in it. Nothing of ``torch.distributed`` is unpickled: its classes
are replaced by stand-ins that only hold the stored values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.errors import CheckpointError
from dinov2_custom.files import utf8_path
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.utils.weights import is_cut

_FLAT = "_flat_param"
_SHARD = "torch.distributed._shard."
_INERT = (
    "metadata.ShardMetadata",
    "sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "sharded_tensor.metadata.ShardedTensorMetadata",
    "sharded_tensor.metadata.TensorProperties",
    "sharded_tensor.shard.Shard",
    "sharding_spec.api.EnumerableShardingSpec",
    "sharding_spec.chunk_sharding_spec.ChunkShardingSpec",
)


class _Inert:
    """Stand-in for a class of torch's sharded tensors that only holds its arguments."""

    def __new__(cls, *args: Any) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.kept = state[1] if isinstance(state, tuple) else state  # a pair for a class with slots


class _InertTensor(Tensor):
    """Stand-in for ShardedTensor, which is rebuilt as a Tensor subclass without data."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} of a stand-in")

    def __setstate__(self, state: Any) -> None:
        self.shards = state[0]  # this process's; metadata, process group and placement are not needed


_STAND_INS = [
    (_InertTensor, f"{_SHARD}sharded_tensor.api.ShardedTensor"),
    (_Inert, "torch.distributed.remote_device._remote_device"),
    (lambda *_: _Inert, "builtins.getattr"),  # by which pickle refers to nested classes and enumeration members
    *((_Inert, _SHARD + name) for name in _INERT),
]


def gather(
    shards: Sequence[Path], config_file: str = "", opts: Sequence[str] = (), allow_unknown_keys: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Return ``{"teacher": {backbone.*, dino_head.*, ...}}``, as in ``teacher_checkpoint.pth``.

    Args:
        shards: the files of one checkpoint, in rank order.
        config_file: the run's configuration; "" for config.yaml beside the files. ``opts`` override it.

    Raises:
        ConfigError: there is no configuration.
        CheckpointError: a file is missing, unreadable, or of another architecture.
    """
    folder = shards[0].parent
    cfg = load_run_config(
        config_file or str(folder / "config.yaml"),
        ["train.output_dir=", *opts],
        allow_unknown_keys=allow_unknown_keys,
        require_dataset=False,
        training=False,
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in SSLMetaArch(cfg).teacher.state_dict().items()}
    parts: dict[str, list[Tensor]] = {}
    for path in shards:
        for name, part in _read(path).items():
            parts.setdefault(name, []).append(part)
    flat = {name.removesuffix(_FLAT): torch.cat(part) for name, part in parts.items() if name.endswith(_FLAT)}
    pieces = {name: torch.cat(part) for name, part in parts.items() if not name.endswith(_FLAT)}
    if not any(len(piece) for piece in pieces.values()):
        pieces = _split(flat, shapes)
    wrong = [
        f"{name}: expected {math.prod(shape)} numbers, got {len(pieces.get(name, ()))}"
        for name, shape in shapes.items()
        if len(pieces.get(name, ())) != math.prod(shape)
    ]
    wrong += [f"{name}: unexpected" for name in pieces if name not in shapes]
    if wrong:
        raise CheckpointError(
            f"expected the files of all processes of a run with the configuration {config_file or 'beside them'}, got "
            f"{len(shards)} in {folder} ({shards[0].name} to {shards[-1].name}), in which {len(wrong)} of "
            f"{len(shapes)} tensors are not whole:\n  "
            + "\n  ".join(wrong[:3])
            + "\ncheck that no process's file is missing, and --config-file"
        )
    return {"teacher": {name: pieces[name].view(shape).clone() for name, shape in shapes.items()}}


def _read(path: Path) -> dict[str, Tensor]:
    """Return the teacher's parts in one process's file, one-dimensional; memory-mapped, so nothing else is read."""
    try:
        with torch.serialization.safe_globals(_STAND_INS), utf8_path(path) as plain:
            file = torch.load(plain, map_location="cpu", weights_only=True, mmap=True)
        parts = {}
        for name, value in file["model"].items():
            if name.startswith("teacher."):
                held = [shard.kept["tensor"] for shard in value.shards] if isinstance(value, _InertTensor) else [value]
                parts[name.removeprefix("teacher.")] = torch.cat([torch.empty(0), *(one.flatten() for one in held)])
    except Exception as e:  # torch raises many types on torn files; foreign files have other classes and keys
        lines = [line for line in str(e).splitlines() if "GLOBAL" in line] or str(e).splitlines() or [""]
        reason = "it is cut short; copy it again" if is_cut(path) else f"{type(e).__name__}: {lines[0][:200]}"
        raise CheckpointError(
            f"expected a checkpoint of one process of facebookresearch/dinov2 at {path}, could not read it: {reason}"
        ) from e
    return parts


def _split(flat: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Split the flat parameter of each unit (by its prefix) into its consecutive parameters.

    A parameter belongs to its innermost enclosing unit.
    """
    pieces = {}
    done = dict.fromkeys(flat, 0)
    for name, shape in shapes.items():
        unit = max((prefix for prefix in flat if name.startswith(prefix)), key=len, default=None)
        if unit is not None:
            start, done[unit] = done[unit], done[unit] + math.prod(shape)
            pieces[name] = flat[unit][start : done[unit]]
    return pieces | {f"{unit}{_FLAT}": flat[unit] for unit, count in done.items() if count != len(flat[unit])}
