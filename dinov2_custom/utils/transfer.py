"""Copies between the host and a GPU that the host does not wait for: they go through pinned memory.

On other devices both functions are plain. Not here: copying whole batches ahead (``data/prefetch.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; from the host to a GPU, the copy is only started."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start the copy of ``tensor`` to the host; it is there when the event, if any, has happened."""
    if tensor.device.type != "cuda":
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
