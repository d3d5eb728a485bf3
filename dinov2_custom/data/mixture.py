"""Combine several datasets by weight, or in proportion to their sizes, deterministically.

Draw n of the run belongs to one dataset and is its m-th draw, both functions of n alone: the weights are paired again
and again (a binary tree, the two lightest together first), and a node with k draws so far has passed ``round(k *
share)`` of them to its left side. So every dataset stays within :attr:`Shares.bound` draws of its share of the draws so
far, and its own draws go through all its images once a pass.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from dinov2_custom.errors import ConfigError
from dinov2_custom.utils.rng import seed_for

from .depth import Reading
from .listing import PassedOver
from .samplers import permuted_index
from .samples import read_pixels

Share = tuple[str, int, float]


class Node(NamedTuple):
    """Inner node of the tree: ``left`` of ``total`` draws go left. A child is a node or the number of a dataset."""

    left: int
    total: int
    children: tuple[Node | int, Node | int]


class Shares:
    """Allocate draws in exact proportion to ``weights`` (positive; a decimal such as 0.7 is taken as written)."""

    def __init__(self, weights: Sequence[float | int]):
        parts = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(part.denominator for part in parts))
        self.weights = [int(part * scale) for part in parts]
        self.shares = [weight / sum(self.weights) for weight in self.weights]
        heap: list[tuple[int, int, Node | int]] = [(weight, i, i) for i, weight in enumerate(self.weights)]
        heapq.heapify(heap)
        number = len(heap)
        while len(heap) > 1:
            (light, _, one), (heavy, _, other) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (light + heavy, number, Node(light, light + heavy, (one, other))))
            number += 1
        self.root = heap[0][2]
        self.bound = _bound(self.root)

    def at(self, draw: int) -> tuple[int, int]:
        """Return (number of the dataset, number of its earlier draws) for a draw >= 0. O(datasets) time and memory."""
        node = self.root
        while isinstance(node, Node):
            left = _rounded(draw * node.left, node.total)
            goes_left = _rounded((draw + 1) * node.left, node.total) > left
            draw = left if goes_left else draw - left
            node = node.children[0 if goes_left else 1]
        return node, draw


def _bound(node: Node | int, error: float = 0.0) -> float:
    """Return the maximum deviation of a leaf's draws from its share; each inner node adds 1/2 to the incoming error."""
    if isinstance(node, int):
        return error
    shares = (node.left / node.total, 1 - node.left / node.total)
    return max(_bound(child, 0.5 + share * error) for child, share in zip(node.children, shares, strict=True))


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


class Mixture(Dataset):
    """The concatenated samples (image, ()) of several datasets, with its own order of drawing.

    ``weights``: one per dataset, above 0; None: in proportion to the sizes, so that each image is drawn once per pass.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        target_transform: Callable | None = None,
    ):
        if weights is not None and (len(weights) != len(datasets) or not all(w > 0 for w in weights)):
            raise ConfigError(f"train.dataset_path: expected a weight above 0 for each dataset, got {list(weights)}")
        self.datasets = list(datasets)
        self.names = list(names)
        self.weights = None if weights is None else list(weights)
        self.target_transform = target_transform
        self.ends = np.cumsum([len(dataset) for dataset in self.datasets])
        self._dealt = None if weights is None else Shares(self.weights)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def part_of(self, index: int) -> tuple[int, int]:
        """Return (number of the dataset, index in it) of sample ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"expected 0..{len(self) - 1}, got {index}")
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, int(index) - self._first(part)

    def _first(self, part: int) -> int:
        return int(self.ends[part - 1]) if part else 0

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        part, own = self.part_of(index)
        return self.datasets[part][own][0], () if self.target_transform is None else self.target_transform(())

    def name(self, index: int) -> str:
        """Return the name of sample ``index`` in its dataset."""
        part, own = self.part_of(index)
        return self.datasets[part].name(own)

    def get_image_data(self, index: int) -> bytes:
        part, own = self.part_of(index)
        return self.datasets[part].get_image_data(own)

    read = get_image_data

    def get_pixels(self, index: int, **options: Any) -> Any:
        """Return the pixels of image ``index``; see ``samples.read_pixels``."""
        part, own = self.part_of(index)
        return read_pixels(self.datasets[part], own, **options)

    def index_of_draw(self, draw: int, seed: int, attempt: int = 0) -> int:
        """Return the sample of draw ``draw`` >= 0, or for ``attempt`` > 0 its replacement from the same dataset.

        A pure function of its arguments, O(1) in time and memory. With weights, each dataset passes over its own
        images independently.
        """
        part, own, first, size = 0, draw, 0, len(self)
        if self._dealt is not None:
            part, own = self._dealt.at(draw)
            first, size = self._first(part), len(self.datasets[part])
            seed = seed_for(seed, "mixture", part)
        if attempt:
            return first + permuted_index(attempt - 1, size, seed_for(seed, "replace", own))
        return first + permuted_index(own, size, seed)

    @property
    def reading(self) -> Reading:
        """The options for decoding files, the same for all datasets."""
        return self.datasets[0].reading

    @reading.setter
    def reading(self, reading: Reading) -> None:
        for dataset in self.datasets:
            dataset.reading = reading

    def digest(self) -> str:
        """Return the combined hashes of all datasets."""
        return " ".join(dataset.digest() for dataset in self.datasets)

    def left_out(self) -> Counter[str]:
        """Return the number of non-image files found in all datasets, by extension."""
        return sum((dataset.left_out() for dataset in self.datasets), Counter())

    def passed_over(self) -> list[PassedOver]:
        """Return the folders and files of all datasets that could not be listed completely."""
        return [one for dataset in self.datasets for one in dataset.passed_over()]

    def shares(self) -> list[Share]:
        """Return (name, number of images, share of the draws) of every dataset."""
        sizes = [len(dataset) for dataset in self.datasets]
        shares = [size / len(self) for size in sizes] if self._dealt is None else self._dealt.shares
        return list(zip(self.names, sizes, shares, strict=True))

    def subset(self, kept: np.ndarray, make: Any) -> Mixture:
        """Return the mixture restricted to the samples ``kept`` (sorted), built with ``make(dataset, indices)``.

        Raises:
            ConfigError: if no image is left of a dataset with a weight.
        """
        cuts = np.searchsorted(kept, [self._first(part) for part in range(len(self.datasets))] + [len(self)])
        parts = [kept[a:b] - self._first(i) for i, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True))]
        empty = [name for name, part in zip(self.names, parts, strict=True) if not len(part)]
        if empty and self.weights is not None:
            raise ConfigError(
                f"train.frac: expected images left to draw from every dataset, got none from {', '.join(empty)}; "
                "lower it"
            )
        datasets = [make(dataset, part) for dataset, part in zip(self.datasets, parts, strict=True)]
        return Mixture(datasets, self.names, self.weights, self.target_transform)
