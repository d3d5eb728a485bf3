"""Start a batch's way to a GPU on a stream of its own, so that it travels while the step before is still computing.

The host is ahead of the GPU by up to a step: when it asks for a batch, the former one is being worked on. On other
devices there are no streams and nothing is ahead. Read :meth:`Copier.__call__` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Copied:
    """A batch, and how to wait until the host memory that it came from is free again."""

    def __init__(self, batch: dict[str, Any], event: torch.cuda.Event | None = None) -> None:
        self.batch, self._event = batch, event

    @property
    def is_done(self) -> bool:
        """Whether nothing of it can still be on its way."""
        return self._event is None

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
            self._event = None


class Copier:
    """Make batches on ``device``: on a CUDA device, on a stream of its own.

    ``cuda``: what has the ``Stream``, ``Event``, ``stream`` and ``current_stream`` of ``torch.cuda``; None: no streams.
    """

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        self.device = device
        self.cuda = cuda or (torch.cuda if device.type == "cuda" else None)
        self.stream = self.cuda.Stream(device) if self.cuda else None

    def __call__(self, make: Callable[[], dict[str, Any]]) -> Copied:
        """Return ``make()``, whose copies and kernels the present stream, not the host, waits for."""
        if self.stream is None:
            return Copied(make())
        with self.cuda.stream(self.stream):
            batch = make()
            event = self.cuda.Event(blocking=True)  # else a host that waits keeps a core busy
            event.record(self.stream)
        user = self.cuda.current_stream(self.device)
        user.wait_event(event)
        for value in batch.values():
            if isinstance(value, torch.Tensor) and value.device.type == self.device.type:
                value.record_stream(user)  # its memory is the user's until that has done with it
        return Copied(batch, event)

    def wait(self) -> None:
        """Wait until nothing that was started here is on its way."""
        if self.stream is not None:
            self.stream.synchronize()
