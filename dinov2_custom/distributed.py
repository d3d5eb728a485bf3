"""Ranks, world size, device of this process, default process group: gloo on CPU, nccl on CUDA, none for one process.

Upstream's names. :func:`enable` reads the rank from the environment (``world.py``) when it is called, not at import;
before that, and in a single process, the rank is 0 and the world size 1. ``print`` is unchanged.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dinov2_custom.errors import LaunchError, reason_of
from dinov2_custom.world import TORCHRUN_VARIABLES, World, world_from_environment

_world: World | None = None  # set by enable(), cleared by disable()
_group_is_ours = False
_timeout: timedelta | None = None  # timeout of a collective; None for torch's default
# With --gpus-per-task each task of srun only sees its own GPU, as number 0; the same may hold for processes that
# started a group.
_OWN_GPU_SOURCES = ("SLURM", "existing process group")
_LONGEST = timedelta(days=24)  # below 2^31 milliseconds, the limit of sockets
_groups = itertools.count()  # of this process: a store keeps the addresses of earlier groups, where nobody answers
_environment_before: dict[str, str | None] = {}  # environment variables changed by enable()


def is_enabled() -> bool:
    """Return whether a process group is running; False in a single process, unless ``enable(alone=True)``."""
    return dist.is_available() and dist.is_initialized()


def get_global_size() -> int:
    """Return the number of processes on all nodes."""
    return dist.get_world_size() if is_enabled() else 1


def get_global_rank() -> int:
    """Return the rank of this process, 0 <= rank < :func:`get_global_size`."""
    return dist.get_rank() if is_enabled() else 0


def get_local_rank() -> int:
    """Return the rank of this process on its node."""
    return current_world().local_rank


def get_local_size() -> int:
    """Return the number of processes on this node."""
    return current_world().local_size


def is_main_process() -> bool:
    """Return whether this is the process that writes files and prints output (rank 0)."""
    return get_global_rank() == 0


def current_world() -> World:
    """Return the world found by :func:`enable`; a single process before that."""
    if _world is not None:
        return _world
    return _world_of_foreign_group() if is_enabled() else World()


def get_device() -> torch.device:
    """Return the device that this process computes on: its own GPU if CUDA is available, else the CPU.

    Float32 is computed in full precision on GPUs as well: this disables TF32, which torch enables for convolutions by
    default, for convolutions and matrix products. Code that should be fast uses 16-bit autocast.

    Raises:
        LaunchError: fewer GPUs than processes, or this build of torch has no kernels for the GPU.
    """
    return _device_of(current_world())


def enable(
    *,
    set_cuda_current_device: bool = True,
    overwrite: bool = False,
    allow_nccl_timeout: bool = False,
    alone: bool = False,
    timeout_s: float | None = None,
) -> None:
    """Determine this process's rank and, with several processes, start the default process group.

    Calling it again with the same environment has no effect. A group that the caller started before is
    adopted. The six torchrun variables are exported for the libraries that read them, until :func:`disable`.

    Args:
        set_cuda_current_device: make this process's GPU the current CUDA device.
        overwrite: replace the setup of an earlier call with another environment.
        allow_nccl_timeout: unused, kept for upstream's signature: a collective that exceeds ``timeout_s`` ends the
            process.
        alone: also start a group in a single process, for code that calls ``torch.distributed`` directly, as
                upstream's does.
        timeout_s: timeout of collectives and of the rendezvous; 0 for none; None for torch's default, 10 minutes with
            nccl and 30 with gloo.

    Raises:
        LaunchError: contradictory environment, fewer GPUs than processes, no kernels for the GPU, or the other
            processes cannot be reached.
    """
    global _world, _group_is_ours, _timeout
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
    world = _world or world  # keep the first one's source; its exports look like torchrun's
    if set_cuda_current_device and torch.cuda.is_available():
        torch.cuda.set_device(_device_of(world))
    _world = world
    if world.size > 1 and not is_enabled():
        _timeout = None if timeout_s is None else timedelta(seconds=timeout_s) if timeout_s else _LONGEST
        _export(world)
        _start_group(world)
        _group_is_ours = True
    elif alone and not is_enabled():
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
        _group_is_ours = True


@contextmanager
def enabled(*, overwrite: bool = False, timeout_s: float | None = None) -> Iterator[None]:
    """Context manager that calls :func:`enable` before the body and, if it succeeds, :func:`disable` after it.

    After an error, other processes may be in a collective that this process never joins, and destroying the group would
    wait for them, with nccl forever. So the group is kept, and ``entry.leave`` ends the process, which they detect.
    """
    enable(overwrite=overwrite, timeout_s=timeout_s)
    try:
        yield
    except BaseException:
        if not is_enabled():
            disable()
        raise
    disable()


def disable() -> None:
    """Stop the process group that :func:`enable` started and restore the environment variables; a no-op without one.

    Do not call it after an error: see :func:`enabled`.
    """
    global _world, _group_is_ours, _timeout
    if _group_is_ours and is_enabled():
        dist.destroy_process_group()
    _world, _group_is_ours, _timeout = None, False, None
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
    """Wait until all processes reach this call. Does nothing in a single process."""
    if is_enabled():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Return the main process's ``value`` (any picklable object) in every process."""
    if not is_enabled():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every process's ``value`` (any picklable object), by rank, in every process."""
    if not is_enabled():
        return [value]
    values = [None] * get_global_size()
    dist.all_gather_object(values, value, group=group)
    return values


def second_group() -> dist.ProcessGroup | None:
    """Start a gloo group of all processes for a separate thread; None in a single one. All processes must call it."""
    return dist.new_group(backend="gloo", timeout=_timeout) if is_enabled() else None


def make_grad_scaler(device_type: str) -> torch.amp.GradScaler:
    """Return a loss scaler; with several processes, which must all call it, one with a common scale."""
    if not is_enabled():
        return torch.amp.GradScaler(device_type)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler  # a slow import

    return ShardedGradScaler(device_type, process_group=dist.group.WORLD)


def share_of_cores() -> int:
    """Return this process's share of the cores that it may use, at least 1.

    A core that several processes of this node may use is shared among them. All processes must call it.
    """
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    here = socket.gethostname()
    users = [set(cores) for host, cores in gather_objects((here, list(own))) if host == here]
    return max(1, int(sum(1 / sum(core in cores for cores in users) for core in own) + 1e-6))


def _world_of_foreign_group() -> World:
    """Describe a group started by other code: ranks from torch, local ranks from the environment."""
    rank, size = get_global_rank(), get_global_size()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(rank, size, local_rank, local_size, source="existing process group")


def _device_of(world: World) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return checked_gpu(torch.device("cuda", _cuda_index(world)))


def checked_gpu(device: torch.device) -> torch.device:
    """Return the GPU ``device``, and compute float32 in full precision from now on, as :func:`get_device` does.

    Raises:
        LaunchError: this build of torch has no kernels for it.
    """
    capability, architectures = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if architectures and torch.version.hip is None and not has_kernels(capability, architectures):
        raise LaunchError(_no_kernels(torch.cuda.get_device_name(device), capability, architectures))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # see get_device
    return device


def _cuda_index(world: World) -> int:
    count = torch.cuda.device_count()
    if world.local_rank < count:
        return world.local_rank
    if count == 1 and world.source in _OWN_GPU_SOURCES:
        return 0
    raise LaunchError(
        f"expected at most {count} processes on this node (one per GPU), got {world.local_size} ({world.source}). "
        f"Start {count} on each node, or hide the GPUs with `CUDA_VISIBLE_DEVICES=` to run on CPU."
    )


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether a torch built for ``architectures`` (see ``torch.cuda.get_arch_list``) supports such a GPU.

    ``sm_86`` is machine code for 8.6 and later minor versions of 8, with suffix "a" for 8.6 only. ``compute_86`` is
    PTX, which the driver translates for any later GPU.

    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    for kind, major, minor, suffix in _parsed(architectures):
        version = (major, minor)
        if version == capability:
            return True
        if suffix != "a" and version < capability and (kind == "compute" or major == capability[0]):
            return True
    return False


def _parsed(architectures: Sequence[str]) -> Iterator[tuple[str, int, int, str]]:
    for name in architectures:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name):
            kind, major, minor, suffix = found.groups()
            yield kind, int(major), int(minor), suffix


def _no_kernels(name: str, capability: tuple[int, int], architectures: Sequence[str]) -> str:
    number = ".".join(map(str, capability))
    if capability < min((major, minor) for _, major, minor, _ in _parsed(architectures)):
        remedy = (
            "Install a build for CUDA 12.6, which has them for 5.0 to 9.0: `pip install torch==2.11.0 --index-url "
            "https://download.pytorch.org/whl/cu126`"
        )
    else:
        remedy = "Install the newest torch, for the newest CUDA that the driver takes: https://pytorch.org/get-started"
    return (
        f"expected a torch with kernels for {name} (compute capability {number}), got torch {torch.__version__} with "
        f"{' '.join(architectures)}. {remedy}, or hide the GPUs with `CUDA_VISIBLE_DEVICES=` to run on CPU."
    )


def _export(world: World) -> None:
    values = (world.rank, world.size, world.local_rank, world.local_size, world.master_addr, world.master_port)
    exported = dict(zip(TORCHRUN_VARIABLES, map(str, values), strict=True))
    for name, value in exported.items():
        _environment_before.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@functools.cache  # kept as long as the process: others may reach a server that is about to end, and use it again
def _store(world: World) -> dist.Store:
    """Connect to the store through which the processes of ``world`` meet."""
    # env:// is the only method that uses torchrun's own store
    return next(dist.rendezvous("env://", **({} if _timeout is None else {"timeout": _timeout})))[0]


def _start_group(world: World) -> None:
    # its functions bind the default group at import, and would keep it forever
    importlib.import_module("torch.distributed.nn.functional")
    try:
        store = dist.PrefixStore(f"group {next(_groups)}", _store(world))
        if _timeout is not None:
            store.set_timeout(_timeout)
        dist.init_process_group(_backend(), store=store, rank=world.rank, world_size=world.size, timeout=_timeout)
    except Exception as e:
        disable()
        raise LaunchError(
            f"expected {world.size} processes to meet at {world.master_addr}:{world.master_port} ({world.source}), "
            f"got for rank {world.rank}: {reason_of(e)}. Start all of them, and check that host and port can be "
            "reached."
        ) from e
