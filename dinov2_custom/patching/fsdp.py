"""Upstream's operations on FSDP internals, for every version of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# until torch 2.0, and since 2.1
_STREAMS = ("_streams",), ("_unshard_stream", "_post_backward_stream", "_pre_unshard_stream", "_all_reduce_stream")


def free_if_sharded(module: Any, is_sharded: Callable[[Any], bool], reshard: Callable[..., None]) -> None:
    """Free the gathered parameters of an FSDP module; ``reshard`` is torch's own function of the installed version."""
    if not is_sharded(module):
        return
    if hasattr(module, "_handles"):  # until torch 2.0
        reshard(module, module._handles, [True] * len(module._handles))
    elif module._handle is not None:  # None: this module has no parameters of its own
        reshard(module, module._handle, True)


def synchronize_streams(arch: Any) -> None:
    """Make the networks of an SSLMetaArch, including the iBOT heads, share the teacher backbone's streams, once."""
    if not arch.need_to_synchronize_fsdp_streams:
        return
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    first = arch.teacher["backbone"]
    networks = [*arch.student.values(), *arch.teacher.values()]
    for name in (name for group in _STREAMS for name in group):
        if all(hasattr(network, name) for network in networks):
            for network in networks:
                setattr(network, name, getattr(first, name))
    arch.need_to_synchronize_fsdp_streams = False
