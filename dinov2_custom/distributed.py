"""Ranks, world size and the default process group: gloo on CPU, nccl on CUDA, nothing at all for a single process.

Upstream's names. The place of a process comes from the environment (``world.py``) when :func:`enable` is called, not
at import; before that, and in a single process, the rank is 0 and the size 1. Nothing here changes ``print``. Not here:
wrapping models (``parallel.py``). Read :func:`enable` first.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
import torch.distributed as dist

from dinov2_custom.errors import LaunchError
from dinov2_custom.world import TORCHRUN_VARIABLES, World, world_from_environment

_world: World | None = None  # set by enable(), cleared by disable()
_group_is_ours = False
_environment_before: dict[str, str | None] = {}  # what enable() changed in os.environ


def is_enabled() -> bool:
    """Return whether a process group is running. False in a single process, unless ``enable(alone=True)``."""
    return dist.is_available() and dist.is_initialized()


def get_global_size() -> int:
    """Return the number of processes on all nodes."""
    return dist.get_world_size() if is_enabled() else 1


def get_global_rank() -> int:
    """Return the number of this process, 0 <= rank < :func:`get_global_size`."""
    return dist.get_rank() if is_enabled() else 0


def get_local_rank() -> int:
    """Return the number of this process on its node."""
    return current_world().local_rank


def get_local_size() -> int:
    """Return the number of processes on this node."""
    return current_world().local_size


def is_main_process() -> bool:
    """Return whether this is the process that writes files and talks to the user (rank 0)."""
    return get_global_rank() == 0


def current_world() -> World:
    """Return what :func:`enable` found; a single process before that."""
    if _world is not None:
        return _world
    return _world_of_foreign_group() if is_enabled() else World()


def enable(
    *,
    set_cuda_current_device: bool = True,
    overwrite: bool = False,
    allow_nccl_timeout: bool = False,
    alone: bool = False,
) -> None:
    """Find this process's place and, where there are several processes, start the default process group.

    Calling it again changes nothing as long as the environment says the same. A group that the caller started before is
    adopted. The six torchrun variables are exported for the libraries that read them, until :func:`disable`.

    Args:
        set_cuda_current_device: make this process's GPU the current CUDA device.
        overwrite: replace what an earlier call set up from another environment.
        allow_nccl_timeout: let a collective that is stuck in nccl end the process after the time-out.
        alone: start a group in a single process too, for code of upstream's kind that calls ``torch.distributed``
            itself.

    Raises:
        LaunchError: contradictory environment, fewer GPUs than processes, or the other processes cannot be reached.
    """
    global _world, _group_is_ours
    if is_enabled() and not _group_is_ours:
        world = _world_of_foreign_group()
    else:
        world = world_from_environment(os.environ)
    if _world is not None and _world != world:
        if not overwrite:
            raise LaunchError(
                f"expected the environment of the first call of enable(): {_world}, got {world}. "
                "Call disable() first, or pass overwrite=True."
            )
        disable()
    world = _world or world  # the first one knows its source; its export reads as torchrun's
    if set_cuda_current_device and torch.cuda.is_available():
        torch.cuda.set_device(_cuda_index(world))
    _world = world
    if world.size > 1 and not is_enabled():
        _export(world, allow_nccl_timeout)
        _start_group(world)
        _group_is_ours = True
    elif alone and not is_enabled():
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
        _group_is_ours = True


def disable() -> None:
    """Stop the process group that :func:`enable` started and put its variables back; harmless without one."""
    global _world, _group_is_ours
    if _group_is_ours and is_enabled():
        dist.destroy_process_group()
    _world, _group_is_ours = None, False
    while _environment_before:
        name, value = _environment_before.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def all_reduce(tensor: torch.Tensor, *, average: bool = False) -> torch.Tensor:
    """Sum or average ``tensor`` over all processes, in place, and return it. Does nothing in a single process."""
    if is_enabled():
        dist.all_reduce(tensor)
        if average:
            tensor.div_(get_global_size())
    return tensor


def barrier() -> None:
    """Wait until every process has come here. Does nothing in a single process."""
    if is_enabled():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Return the main process's ``value`` (anything that can be pickled) in every process."""
    if not is_enabled():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every process's ``value`` (anything that can be pickled), by rank, in every process."""
    if not is_enabled():
        return [value]
    values = [None] * get_global_size()
    dist.all_gather_object(values, value, group=group)
    return values


def second_group() -> dist.ProcessGroup | None:
    """Start a gloo group of all processes for a thread of its own; None in a single process. All must call it."""
    return dist.new_group(backend="gloo") if is_enabled() else None


def _world_of_foreign_group() -> World:
    """Describe a group that somebody else started: ranks from torch, the place on the node from the environment."""
    rank, size = get_global_rank(), get_global_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(rank, size, local_rank, local_size, source="existing process group")


def _cuda_index(world: World) -> int:
    count = torch.cuda.device_count()
    if world.local_rank < count:
        return world.local_rank
    if count == 1 and world.source == "SLURM":  # --gpus-per-task: each task sees its own GPU only, as number 0
        return 0
    raise LaunchError(
        f"expected at most {count} processes on this node (one a GPU), got {world.local_size} ({world.source}). "
        f"Start {count} on each node, or hide the GPUs with `CUDA_VISIBLE_DEVICES=` to run on CPU."
    )


def _export(world: World, allow_nccl_timeout: bool) -> None:
    values = (world.rank, world.size, world.local_rank, world.local_size, world.master_addr, world.master_port)
    exported = dict(zip(TORCHRUN_VARIABLES, map(str, values), strict=True))
    if allow_nccl_timeout and "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ:
        exported["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
    for name, value in exported.items():
        _environment_before.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _start_group(world: World) -> None:
    # Its functions take the group of the moment of its import as a default, and would keep it for ever.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        dist.init_process_group(_backend())  # from the environment: the only way that finds torchrun's own store
    except Exception as e:
        disable()
        raise LaunchError(
            f"expected {world.size} processes to meet at {world.master_addr}:{world.master_port} ({world.source}), "
            f"got for rank {world.rank}: {e}. Start all of them, and check that host and port can be reached."
        ) from e
