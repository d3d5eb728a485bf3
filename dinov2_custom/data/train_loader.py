"""TrainLoader: the endless batches of one rank, built by other processes (or here), finished on the model's device.

Not in here: what is in a batch (``train_batches``), processes (``pool``), making one from a configuration
(``loaders.make_train_loader``). Read :meth:`TrainLoader.batches` first.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from .finish import Finisher
from .pixels import opencv, resize_kernel
from .pool import Built, Ring
from .prefetch import Copier
from .samples import BadImages
from .slots import allocate
from .train_batches import TrainBatches, unpack
from .workers import AutoWorkers, at_most_cores

logger = logging.getLogger("dinov2")


class TrainLoader:
    """An endless sequence of collated batches of one rank, the same whatever ``num_workers`` is.

    ``num_images``: images to train on. ``draws``: number of the job's next draw, which a resumed run gives to
    :meth:`batches`.
    ``num_workers``: processes, 0: none but this one, "auto": as many as keep up, at most ``cores``.
    ``colours``: where the colour changes are made, "cpu" | "device" | "auto" (on the device if it is not a CPU);
    the pixels are the same.
    """

    def __init__(
        self,
        builder: TrainBatches,
        finish: Finisher,
        bad_images: BadImages,
        *,
        num_workers: int | str,
        cores: int | None = None,
        colours: str = "auto",
        start_iteration: int = 0,
    ):
        self.builder = builder
        self.finish = finish
        self.bad_images = bad_images
        self.num_workers = num_workers
        self.cores = cores
        self.colours = colours
        self.start_iteration = start_iteration
        self.num_images = len(builder.samples.dataset)
        self.found: dict[str, Any] = {"resize": resize_kernel()}  # what a checkpoint keeps of the data
        self.draws = start_iteration * builder.batch_size * builder.world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.batches(self.start_iteration)

    def batches(
        self, start_iteration: int = 0, device: torch.device | str = "cpu", *, first_draw: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Yield the batches from ``start_iteration`` on, counted from ``first_draw``; their crops on ``device``.

        Raises:
            DataError: too many images cannot be read, or the data-loading processes die again and again.
        """
        device = torch.device(device)
        batch_size, world_size = self.builder.batch_size, self.builder.world_size
        self.draws = first_draw + start_iteration * batch_size * world_size
        copier = Copier(device)
        source, auto = self._source(start_iteration, device, first_draw)
        try:
            while True:
                built = source.next_batch()
                self.bad_images.add(batch_size, built.result.bad)
                if not built.result.complete:
                    raise self.bad_images.error()
                copied = copier(partial(unpack, built.arrays, built.result.upperbound, self.finish, device))
                if copied.is_done:
                    source.release(built.slot)
                self.draws += batch_size * world_size
                start = time.perf_counter()
                yield copied.batch
                if not copied.is_done:
                    copied.wait()
                    source.release(built.slot)
                if auto is not None and auto.observe(built.seconds, time.perf_counter() - start):
                    source.grow(auto.chosen)
        finally:
            try:
                copier.wait()  # copies may still read the memory that is freed now
            finally:
                source.close()

    def _source(self, start_iteration: int, device: torch.device, first_draw: int) -> tuple[Any, AutoWorkers | None]:
        """Start what builds the batches; for ``num_workers`` "auto" also what chooses the number of processes."""
        builder = copy.copy(self.builder)
        builder.first_draw = first_draw
        builder.late_colours = self.colours == "device" or (self.colours == "auto" and device.type != "cpu")
        # looked for here, once, rather than in each process
        where = "on the device" if builder.late_colours else "by OpenCV" if opencv() else "by numpy"
        logger.info(f"crops are resized by {resize_kernel()}, their colours changed {where}")
        pinned = device.type == "cuda"
        if self.num_workers == "auto":
            auto = AutoWorkers(builder.batch_size, self.cores)
            return open_ring(builder, auto.first, start_iteration, pinned=pinned, max_workers=auto.most), auto
        return open_ring(builder, at_most_cores(self.num_workers), start_iteration, pinned=pinned), None


def open_ring(builder: Any, num_workers: int, first: int, *, pinned: bool = False, **options: Any) -> Any:
    """Return what builds batches from number ``first`` on: a :class:`Ring` of processes, with 0 :class:`InProcess`."""
    if num_workers == 0:
        return InProcess(builder, first)
    return (PinnedRing if pinned else Ring)(builder, num_workers, first, **options)


class InProcess:
    """What :class:`Ring` does, in this process, when the batch is asked for."""

    def __init__(self, builder: Any, first_iteration: int):
        self.builder = builder
        self.iterations = itertools.count(first_iteration)
        self.arrays = allocate(builder.fields)

    def next_batch(self) -> Built:
        start = time.perf_counter()
        report = self.builder.build(next(self.iterations), self.arrays)
        return Built(0, self.arrays, report, time.perf_counter() - start)

    def release(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


class PinnedRing(Ring):
    """A :class:`Ring` whose slots CUDA copies from directly; where it will not, through its own buffers.

    A slot is pinned when its first batch is there: with fewer processes than ``max_workers``, most never are.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._pinned: dict[int, int] = {}  # slot -> its address
        self._can_pin = True

    def next_batch(self) -> Built:
        built = super().next_batch()
        if self._can_pin and built.slot not in self._pinned:
            self._pin(built.slot)
        return built

    def _pin(self, slot: int) -> None:
        place: np.ndarray = self.slots.bytes_of(slot)
        error = int(torch.cuda.cudart().cudaHostRegister(place.ctypes.data, place.nbytes, 0))
        if not error:
            self._pinned[slot] = place.ctypes.data
            return
        self._can_pin = False
        _clear_cuda_error()
        logger.info(f"batches are copied once more on their way: memory could not be pinned (CUDA error {error})")

    def close(self) -> None:
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.popitem()[1])
        super().close()


def _clear_cuda_error() -> None:
    """Raise and drop what a failed call leaves behind: CUDA's last error, which the next launch of a kernel raises."""
    try:
        torch.ones((), device="cuda")
    except RuntimeError:
        pass
