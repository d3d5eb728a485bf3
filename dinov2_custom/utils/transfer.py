"""Copies between the host and a GPU that the host does not wait for: they go through pinned memory.

On other devices everything is plain. Not here: copying whole batches ahead (``data/loaders.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; from the host to a GPU, the copy is only started."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy(NamedTuple):
    """A copy on its way to the host; it is there when ``ready``, if any, has happened."""

    tensor: Tensor
    ready: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """Return the tensor; wait for it if it is not there yet."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.tensor

    def tolist(self) -> list[float]:
        """Return the numbers; wait for them if they are not there yet."""
        return self.wait().tolist()


def to_host(tensor: Tensor) -> HostCopy:
    """Start the copy of ``tensor`` to the host."""
    if tensor.device.type != "cuda":
        return HostCopy(tensor)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event(blocking=True)  # else a host that waits keeps a core busy
    event.record()
    return HostCopy(copy, event)
