"""The labelled datasets of an evaluation: opened, checked, and with one numbering of the classes.

Not the reading of images (``data/``). Read :func:`open_pair` first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.errors import ConfigError, DataError


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

    def __len__(self) -> int:
        return len(self.dataset)


def open_labelled(flag: str, dataset_str: str, transform: Callable | None = None) -> Any:
    """Open the dataset that the command-line flag ``flag`` gives.

    Raises:
        ConfigError: a dataset without labels.
        DataError: missing folders or no image in them.
    """
    dataset = make_dataset(dataset_str=dataset_str, transform=transform)
    if not hasattr(dataset, "get_targets") or dataset.get_targets() is None:
        raise ConfigError(
            f"{flag}: expected images with labels, got {dataset_str}; write LabelledFolder:root=<a folder a class>"
        )
    return dataset


def open_pair(train: tuple[str, str, Callable | None], other: tuple[str, str, Callable | None]) -> tuple[Any, Any]:
    """Open two datasets, each given as (flag, dataset string, transform); the second has the first one's class indices.

    Raises:
        ConfigError: a dataset without labels.
        DataError: nothing found, or a class folder of the second that the first one lacks.
    """
    train_dataset, other_dataset = open_labelled(*train), open_labelled(*other)
    return train_dataset, match_classes(train_dataset, other_dataset, train[0], other[0])


def match_classes(train_dataset: Any, other_dataset: Any, train_flag: str, other_flag: str) -> Any:
    """Return ``other_dataset`` with the class indices of ``train_dataset`` where both have a folder a class.

    Raises:
        DataError: a class folder that has no training images.
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


def num_classes_of(dataset: Any) -> int:
    """Return the largest class index + 1."""
    return int(np.max(dataset.get_targets())) + 1
