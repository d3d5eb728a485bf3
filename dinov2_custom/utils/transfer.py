"""Asynchronous copies between the host and a GPU, through pinned memory.

On other devices copies are synchronous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; a copy from the host to a GPU is asynchronous, through pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")  # there it may read memory that is reused meanwhile


class HostCopy(NamedTuple):
    """A pending copy to the host; complete when the event ``ready``, if any, has occurred."""

    tensor: Tensor
    ready: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """Return the tensor; wait for the copy if necessary."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.tensor

    def tolist(self) -> list[float]:
        """Return the numbers; wait for the copy if necessary."""
        return self.wait().tolist()


def to_host(tensor: Tensor) -> HostCopy:
    """Start an asynchronous copy of ``tensor`` to the host."""
    if tensor.device.type != "cuda":
        return HostCopy(tensor)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event(blocking=True)  # otherwise waiting would busy-loop on a core
    event.record(torch.cuda.current_stream(tensor.device))  # not of the current device, which may be another GPU
    return HostCopy(copy, event)
