"""Batches of transformed images for a frozen model, built by the same processes and shared memory as in training.

The shared memory is not in ``/dev/shm``, which has only 64 MB in a container.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from dinov2_custom.errors import DataError, UnreadableImageError, shortage

from .pool import Field, at_most_cores, open_ring

HANG_S = 600.0  # time without a batch after which a process is considered to hang


class Batch(NamedTuple):
    """Images (n, C, H, W), targets and indices of the readable images; ``bad``: index -> reason for the others."""

    images: Tensor
    targets: list[Any]
    indices: list[int]
    bad: dict[int, str]


class ImageBatches:
    """Builder for :class:`pool.Ring`: batch i has the images ``indices(i)`` of ``dataset``.

    Args:
        dataset: returns (image, target).
        transform: converts an image of ``dataset`` to a tensor; None if it is one already.
        shape: (C, H, W) of every tensor.
        skip_bad: report unreadable images in the batch instead of raising.
    """

    def __init__(
        self,
        dataset: Any,
        indices: Callable[[int], Sequence[int]],
        batch_size: int,
        shape: Sequence[int],
        *,
        transform: Callable | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.dataset, self.indices, self.transform, self.skip_bad = dataset, indices, transform, skip_bad
        self.fields = {"images": Field((batch_size, *shape), np.float32)}
        self._given_up: dict[int, str] = {}

    def name(self, index: int) -> str:
        """Return the name of image ``index`` for messages."""
        return self.dataset.name(index) if hasattr(self.dataset, "name") else f"image {index}"

    def give_up(self, index: int, reason: str) -> None:
        """Mark image ``index`` as unreadable."""
        self._given_up[index] = reason

    def build(
        self, iteration: int, arrays: dict[str, np.ndarray], note: Callable[[int], Any] = lambda index: None
    ) -> tuple[list[Any], list[int], dict[int, str]]:
        """Write the readable images to the front of ``arrays["images"]``; return targets, indices and bad images.

        Raises:
            UnreadableImageError: if an image cannot be read and ``skip_bad`` is false.
        """
        targets, good, bad = [], [], {}
        for index in self.indices(iteration):
            note(index)
            try:
                if index in self._given_up:
                    raise UnreadableImageError(f"{self.name(index)}: {self._given_up[index]}")
                image, target = self.dataset[index]
            except (DataError, OSError) as e:
                if error := shortage(e, self.name(index)):
                    raise error from e
                if not self.skip_bad:
                    raise
                bad[index] = str(e)
                continue
            arrays["images"][len(good)] = image if self.transform is None else self.transform(image)
            targets.append(target)
            good.append(index)
        return targets, good, bad


class ImageLoader:
    """Iterable over (images, targets) of the batches ``start``, ``start`` + 1, ...; may be iterated over repeatedly.

    Args:
        dataset: returns (float tensor (C, H, W), target).
        indices: function from i to the indices of the images of batch i, at most ``batch_size``.
        stop: number of the batch after the last; None for an endless sequence.
        collate: combines a list of targets into a batch; default: torch's.

    Raises:
        DataError: if an image cannot be read or a process hangs; names the image.
    """

    def __init__(
        self,
        dataset: Any,
        indices: Callable[[int], Sequence[int]],
        batch_size: int,
        *,
        num_workers: int,
        start: int = 0,
        stop: int | None = None,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self.dataset, self.indices, self.batch_size, self.num_workers = dataset, indices, batch_size, num_workers
        self.start, self.stop, self.collate = start, stop, collate

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        if self.start == self.stop:
            return
        image = self.dataset[self.indices(self.start)[0]][0]
        builder = ImageBatches(self.dataset, self.indices, self.batch_size, image.shape)
        for batch in batches(builder, self.num_workers, self.start, self.stop):
            yield batch.images, self.collate(batch.targets)


def of_list(indices: Sequence[int], batch_size: int) -> tuple[Callable[[int], Sequence[int]], int]:
    """Return a function from i to the images of batch i, and the number of batches."""
    return partial(_part, indices, batch_size), -(-len(indices) // batch_size)


def repeated(indices: Callable[[int], Sequence[int]], number: int, i: int) -> Sequence[int]:
    """Return the images of batch i of an endless sequence, which repeats the ``number`` batches ``indices``."""
    return indices(i % number)


def _part(indices: Sequence[int], batch_size: int, i: int) -> Sequence[int]:
    return indices[i * batch_size : (i + 1) * batch_size]


def batches(builder: ImageBatches, num_workers: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Yield the batches ``start``..``stop`` of ``builder``, built by ``num_workers`` processes (0: in this process).

    Images are copied once, into pinned memory on a machine with a GPU. For errors raised see :class:`ImageLoader`.
    """
    ring = open_ring(builder, at_most_cores(num_workers), start, stop=stop, hang_s=HANG_S)
    pinned = torch.cuda.is_available()
    try:
        while stop is None or start < stop:
            built = ring.next_batch()
            targets, good, bad = built.result
            images = torch.from_numpy(built.arrays["images"][: len(good)])
            images = images.pin_memory() if pinned and good else images.clone()
            ring.release(built.slot)
            yield Batch(images, targets, good, bad)
            start += 1
    finally:
        ring.close()
