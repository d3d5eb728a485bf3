"""Batches of a dataset's images for a frozen model, in order, the unreadable ones named instead of raised.

Read :func:`batches` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2_custom.data.workers import at_most_cores, set_up_worker
from dinov2_custom.errors import DataError, shortage


class _Readable(Dataset):
    """(index, tensor, "") or (index, None, reason) of each image."""

    def __init__(self, dataset: Any, transform: Callable) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            image, _ = self.dataset[index]
            return index, self.transform(image), ""
        except (DataError, OSError) as e:
            if error := shortage(e, self.dataset.name(index)):
                raise error from e
            return index, None, str(e)


def batches(
    dataset: Any, transform: Callable, groups: Sequence[Sequence[int]], num_workers: int
) -> Iterator[tuple[Tensor | None, list[int], dict[int, str]]]:
    """Yield (images (n, C, S, S) or None, their indices, reasons of the unreadable ones) of each group of indices.

    Args:
        dataset: images without a transform.
    """
    workers = at_most_cores(num_workers)
    loader = DataLoader(
        _Readable(dataset, transform),
        batch_sampler=[list(group) for group in groups],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=set_up_worker if workers else None,
    )
    yield from loader


def _collate(samples: list[tuple[int, Tensor | None, str]]) -> tuple[Tensor | None, list[int], dict[int, str]]:
    good = [(index, image) for index, image, _ in samples if image is not None]
    bad = {index: reason for index, image, reason in samples if image is None}
    images = torch.stack([image for _, image in good]) if good else None
    return images, [index for index, _ in good], bad
