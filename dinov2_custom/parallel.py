"""Data parallelism: the mean of all processes' gradients, reduced while the backward pass still runs.

Parameters keep their names and the model its class; nothing is wrapped. Not here: ranks and groups
(``distributed.py``), sharding. Read :class:`GradientReducer` first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2_custom import distributed

BUCKET_MIB = 25.0


class _Bucket:
    """Parameters whose gradients travel together; ``flat`` holds them end to end, then one count of users for each."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.waiting: set[int] = set()
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None

    def launch(self) -> None:
        """Start the sum over all processes of what is there; a parameter without gradient counts as zeros."""
        parts = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in self.parameters]
        used = torch.tensor([float(p.grad is not None) for p in self.parameters])
        self.flat = torch.cat([*parts, used.to(parts[0], non_blocking=True)])
        self.work = dist.all_reduce(self.flat, async_op=True)

    def finish(self, world_size: int) -> None:
        """Wait, and write the means back; what no process used stays without gradient."""
        self.work.wait()
        sizes = [p.numel() for p in self.parameters]
        *means, used = self.flat.div_(world_size).split([*sizes, len(sizes)])
        for parameter, mean, is_used in zip(self.parameters, means, (used > 0).tolist(), strict=True):
            parameter.grad = mean.view_as(parameter) if is_used else None
        self.flat = self.work = None


class GradientReducer:
    """Average gradients over all processes, in buckets, each sent as soon as its last gradient is there.

    Buckets are sent in one fixed order, so that processes whose graphs differ (no masked patch here, some there) still
    agree. In a single process nothing happens. Use::

        reducer.arm()           # before the last backward pass of a step
        loss.backward()
        reducer.finish()

    Backward passes before :meth:`arm` only accumulate.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_mib: float = BUCKET_MIB) -> None:
        self.world_size = distributed.get_global_size()
        self.armed = False
        self.buckets: list[_Bucket] = []
        if self.world_size == 1:
            return
        # the last layers' gradients come first
        for run in _grouped(list(parameters)[::-1], bucket_mib * 2**20):
            self.buckets.append(_Bucket(run))
            for parameter in run:
                parameter.register_post_accumulate_grad_hook(self._hook(self.buckets[-1]))

    def arm(self) -> None:
        """Expect the last backward pass of this step."""
        self.armed, self._next = True, 0
        for bucket in self.buckets:
            bucket.waiting = {id(parameter) for parameter in bucket.parameters}

    def finish(self) -> None:
        """Send what is left, wait for everything and write the means into ``.grad``."""
        self.armed = False
        for bucket in self.buckets[self._next :]:
            bucket.launch()
        for bucket in self.buckets:
            bucket.finish(self.world_size)

    def _hook(self, bucket: _Bucket):
        def on_gradient(parameter: nn.Parameter) -> None:
            if self.armed:
                bucket.waiting.discard(id(parameter))
                while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
                    self.buckets[self._next].launch()
                    self._next += 1

        return on_gradient


def _grouped(parameters: list[nn.Parameter], max_bytes: float) -> Iterable[list[nn.Parameter]]:
    """Cut the list into runs of one dtype and at most ``max_bytes`` (a larger parameter is a run of its own)."""
    run: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        if run and (size + num_bytes > max_bytes or parameter.dtype != run[0].dtype):
            yield run
            run, size = [], 0
        run.append(parameter)
        size += num_bytes
    if run:
        yield run
