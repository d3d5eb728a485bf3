"""Return the index of each image with its target, so that evaluation can drop the images a sampler repeats."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset


class DatasetWithEnumeratedTargets(Dataset):
    """Replace the target of every sample by (index, target), or by the index alone where the target is None.

    Source: upstream data/adapters.py.
    """

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def get_image_data(self, index: int) -> bytes:
        return self._dataset.get_image_data(index)

    def name(self, index: int) -> str:
        return self._dataset.name(index)

    def get_target(self, index: int) -> Any:
        return _enumerated(index, self._dataset.get_target(index))

    def get_sample_decoder(self, index: int) -> Any:
        return self._dataset.get_sample_decoder(index)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self._dataset[index]
        return image, _enumerated(index, target)

    def __len__(self) -> int:
        return len(self._dataset)


def _enumerated(index: int, target: Any) -> Any:
    return index if target is None else (index, target)
