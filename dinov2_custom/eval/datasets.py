"""Open and check the labelled datasets of an evaluation, with a common numbering of the classes."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset, default_collate

from dinov2_custom import distributed
from dinov2_custom.data.datasets.extended import ExtendedVisionDataset
from dinov2_custom.data.depth import Reading
from dinov2_custom.data.image_batches import ImageLoader, of_list
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.data.samplers import permuted_index
from dinov2_custom.data.spec import KEY
from dinov2_custom.data.transforms import RandomTransform
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.reading import choose_reading
from dinov2_custom.utils.rng import random_for

logger = logging.getLogger("dinov2")


class Relabelled(Dataset):
    """``dataset`` with each class index replaced by ``new_index[index]``."""

    def __init__(self, dataset: Any, new_index: np.ndarray) -> None:
        self.dataset, self.new_index = dataset, new_index

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.dataset[index]
        return image, int(self.new_index[target])

    def get_targets(self) -> np.ndarray:
        """Return the class index of every image, int64 (len,)."""
        return self.new_index[self.dataset.get_targets()]

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def __len__(self) -> int:
        return len(self.dataset)


class Joined(Dataset):
    """The images of ``first``, then those of ``second``."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second

    def _find(self, index: int) -> tuple[Any, int]:
        start = len(self.first)
        return (self.first, index) if index < start else (self.second, index - start)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        dataset, index = self._find(index)
        return dataset[index]

    def name(self, index: int) -> str:
        """Return the name of image ``index``."""
        dataset, index = self._find(index)
        return dataset.name(index)

    def __len__(self) -> int:
        return len(self.first) + len(self.second)


def open_labelled(
    flag: str, dataset_str: str, transform: Callable | None = None, reading: Reading | None = None
) -> Any:
    """Open the dataset given by the command-line flag ``flag``; measure a range if ``reading`` has none.

    Raises:
        ConfigError: the dataset has no labels.
        DataError: folders are missing or empty.
    """
    try:
        dataset = make_dataset(dataset_str=dataset_str, transform=transform)
    except (ConfigError, DataError) as e:  # the message of training, but naming the flag
        raise type(e)(f"{flag}: {str(e).removeprefix(f'{KEY}: ')}") from e
    if not hasattr(dataset, "get_targets") or dataset.get_targets() is None:
        raise ConfigError(
            f"{flag}: expected images with labels, got {dataset_str}; write LabelledFolder:root=<one folder per class>"
        )
    choose_reading(dataset, reading)
    return dataset


def open_pair(
    train: tuple[str, str, Callable | None], other: tuple[str, str, Callable | None], reading: Reading | None = None
) -> tuple[Any, Any]:
    """Open two datasets, each given as (flag, dataset string, transform); the second uses the first's class indices.

    The second also uses the first one's range if ``reading`` has none. Two equal strings and transforms give one
    dataset.
    """
    train_dataset = open_labelled(*train, reading)
    if other[1:] == train[1:]:
        return train_dataset, train_dataset
    other_dataset = open_labelled(*other, train_dataset.reading)
    return train_dataset, match_classes(train_dataset, other_dataset, train[0], other[0])


def match_classes(train_dataset: Any, other_dataset: Any, train_flag: str, other_flag: str) -> Any:
    """Return ``other_dataset`` with the class indices of ``train_dataset`` if both have a folder per class.

    Raises:
        DataError: a class folder has no training images.
    """
    train_classes, other_classes = (getattr(d, "class_to_idx", None) for d in (train_dataset, other_dataset))
    if train_classes is None or other_classes is None or train_classes == other_classes:
        return other_dataset
    unknown = sorted(set(other_classes) - set(train_classes))
    if unknown:
        raise DataError(
            f"{other_flag}: expected the class folders of {train_flag} ({len(train_classes)}), got {len(unknown)} "
            f"others: {', '.join(unknown[:5])}; give both datasets the same folder names"
        )
    new_index = [train_classes[name] for name in sorted(other_classes, key=other_classes.get)]
    return Relabelled(other_dataset, np.array(new_index))


def find_same_files(train_dataset: Any, other_dataset: Any) -> np.ndarray:
    """Return, for each image of ``other_dataset``, the index of the same file in ``train_dataset``; -1 if absent.

    int64 (len(other_dataset),). Links are resolved. Images without a path match none.
    """
    places = {path: index for index, path in enumerate(_paths_of(train_dataset))}
    found = [places.get(path, -1) for path in _paths_of(other_dataset)] if places else []
    return np.array(found or [-1] * len(other_dataset), dtype=np.int64)


def warn_of_same_files(train_dataset: Any, other_dataset: Any, train_flag: str, other_flag: str) -> None:
    """Warn if scored images are also training images."""
    if count := int((find_same_files(train_dataset, other_dataset) >= 0).sum()):
        logger.warning(
            f"{other_flag}: {count:,} of {len(other_dataset):,} images are images of {train_flag}, too; the accuracy "
            "on those says nothing about new ones"
        )


def _paths_of(dataset: Any) -> list[str]:
    """Return the real path of every image, or an empty list if images have no paths."""
    owner = dataset.dataset if isinstance(dataset, Relabelled) else dataset
    if getattr(type(owner), "name", ExtendedVisionDataset.name) is ExtendedVisionDataset.name:
        return []
    real_folder = functools.cache(os.path.realpath)
    paths = []
    for index in range(len(dataset)):
        folder, file = os.path.split(owner.name(index))
        path = os.path.join(real_folder(folder), file)
        paths.append(os.path.realpath(path) if os.path.islink(path) else path)
    return paths


def num_classes_of(dataset: Any) -> int:
    """Return the largest class index + 1."""
    return int(np.max(dataset.get_targets())) + 1


class Draws(Dataset):
    """Augmented training samples by draw number: image, crop and flip depend only on (``seed``, number).

    Args:
        dataset: yields (PIL image, class index).
    """

    def __init__(self, dataset: Any, transform: Callable, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, draw: int) -> tuple[Any, int]:
        image, target = self.dataset[permuted_index(draw, len(self.dataset), self.seed)]
        if isinstance(self.transform, RandomTransform):
            return self.transform(image, random_for(self.seed, "classification", draw)), target
        return self.transform(image), target

    def name(self, draw: int) -> str:
        """Return the name of the image of a draw."""
        return self.dataset.name(permuted_index(draw, len(self.dataset), self.seed))


def draws_for_training(
    dataset: Any, transform: Callable, seed: int, batch_size: int, *, num_workers: int, start_iteration: int = 0
) -> ImageLoader:
    """Return an endless loader of batches of :class:`Draws`, with each rank's block of every global batch.

    Global batch i consists of the draws [i*b*W, (i+1)*b*W), of which rank r receives the r-th block of b =
    ``batch_size``.

    Args:
        start_iteration: number of batches already consumed.
    """
    rank, world_size = distributed.get_global_rank(), distributed.get_global_size()
    indices = functools.partial(_block, batch_size, rank, world_size)
    draws = Draws(dataset, transform, seed)
    return ImageLoader(draws, indices, batch_size, num_workers=num_workers, start=start_iteration)


def _block(batch_size: int, rank: int, world_size: int, iteration: int) -> range:
    first = (iteration * world_size + rank) * batch_size
    return range(first, first + batch_size)


def every_image_once(
    dataset: Any, batch_size: int, num_workers: int, collate: Callable[[list[Any]], Any] = default_collate
) -> ImageLoader:
    """Return a loader that yields every image exactly once over all ranks, in the dataset's order.

    Args:
        collate: collates a batch's targets.
    """
    own = range(distributed.get_global_rank(), len(dataset), distributed.get_global_size())
    indices, number = of_list(own, batch_size)
    return ImageLoader(dataset, indices, batch_size, num_workers=num_workers, stop=number, collate=collate)
