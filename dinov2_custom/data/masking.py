"""Patch masks for the iBOT loss: the shape of one mask, and the masks of one optimizer step.

:class:`MaskingGenerator` is upstream's sampler of random rectangles, draw for draw, on the bits of one integer instead
of patch by patch. :func:`masks_of_draws` finds each mask of a step on its own, from (seed, step, draw). Upstream masks
a share of the crops of one process's batch and spreads their ratios evenly over a range; here the batch is that of the
whole step, over all processes and accumulated batches, so how these are cut does not matter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import exp, sqrt
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

from dinov2_custom.utils.rng import random_for, seed_for

from .samplers import permuted_index

TRIES = 10


class MaskingGenerator:
    """Sample boolean masks over a grid of patches, built from rectangles.

    ``input_size``: (rows, columns) of the grid, or one number for both. A rectangle's area is uniform between
    ``min_num_patches`` and the smaller of ``max_num_patches`` (None: unbounded) and the number still missing;
    its aspect is log-uniform in ``min_aspect``..``max_aspect`` (None: ``1 / min_aspect``).

    Source: upstream data/masking.py (BEiT's blockwise masking, https://arxiv.org/abs/2106.08254, algorithm 1).
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: float | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ):
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.num_patches = self.height * self.width
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        limits = (max_num_patches, num_masking_patches, self.num_patches)
        self.max_num_patches = next(limit for limit in limits if limit is not None)
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))
        # bit y * width + x is the patch of row y and column x; here the rectangle of h rows and w columns at the origin
        self._rectangles = [[0] * self.width]
        for y in range(self.height - 1):
            taller = [one | ((1 << w) - 1) << (y * self.width) for w, one in enumerate(self._rectangles[-1])]
            self._rectangles.append(taller)

    def __repr__(self) -> str:
        low, high = self.log_aspect_ratio
        return (
            f"MaskingGenerator({self.height} x {self.width} patches, rectangles of {self.min_num_patches} to "
            f"{self.max_num_patches}, log aspect {low:.3f} to {high:.3f})"
        )

    def get_shape(self) -> tuple[int, int]:
        """Return (rows, columns) of the grid."""
        return self.height, self.width

    def __call__(self, num_masking_patches: int = 0, rng: random.Random | ModuleType | None = None) -> np.ndarray:
        """Return a bool (rows, columns) mask of about ``num_masking_patches`` patches, never more.

        Stops early when ``TRIES`` rectangles in a row do not fit, so a tiny grid may stay empty. ``rng`` None draws
        from the ``random`` module's global stream, as upstream does.
        """
        rng = rng or random
        mask, count = 0, 0
        while count < num_masking_patches:
            mask, added = self._add_rectangle(mask, min(num_masking_patches - count, self.max_num_patches), rng)
            if added == 0:
                break
            count += added
        packed = np.frombuffer(mask.to_bytes((self.num_patches + 7) // 8, "little"), np.uint8)
        patches = np.unpackbits(packed, bitorder="little", count=self.num_patches)
        return patches.view(np.bool_).reshape(self.height, self.width)

    def _add_rectangle(self, mask: int, max_added: float, rng: random.Random | ModuleType) -> tuple[int, int]:
        """Return ``mask`` with another rectangle that adds 1..``max_added`` patches, and their number (0: no fit)."""
        height, width, draw = self.height, self.width, rng.random
        least, (low, high) = self.min_num_patches, self.log_aspect_ratio
        more, wider = max_added - least, high - low
        for _ in range(TRIES):
            area = least + more * draw()
            aspect = exp(low + wider * draw())
            h, w = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if w >= width or h >= height:
                continue
            top = rng.randrange(height - h + 1)
            rectangle = self._rectangles[h][w] << (top * width + rng.randrange(width - w + 1))
            added = (rectangle & ~mask).bit_count()
            if 0 < added <= max_added:
                return mask | rectangle, added
        return mask, 0


class Masks(NamedTuple):
    """Parameters of a step's masks: the fraction of crops to mask (``probability``) and the range of mask ratios.

    ``generator(n, rng=)`` returns a mask of at most n of the ``n_tokens`` patches.
    """

    ratios: Sequence[float]
    probability: float
    n_tokens: int
    generator: Callable[..., np.ndarray]


class Step(NamedTuple):
    """The draws of one optimizer step: ``size`` draws starting at number ``first``."""

    first: int
    size: int


def masks_of_draws(masks: Masks, seed: int, step: Step, draws: Sequence[int]) -> tuple[np.ndarray, int]:
    """Return bool masks (2 * len(draws), n_tokens) of the global crops of ``draws``, and an upper bound on their sum.

    Rows are crop-major: the first crops of all draws, then their second crops. A permutation selects
    ``int(2 * size * probability)`` of the step's 2 * size crops; the ratio of the j-th lies in the j-th of as many
    equal bins.
    """
    num_crops = 2 * step.size
    edges = _edges(tuple(masks.ratios), int(num_crops * masks.probability))
    order = seed_for(seed, "mask order", step.first)
    rows = np.zeros((2 * len(draws), masks.n_tokens), np.bool_)
    upperbound = 0
    for row, (crop, draw) in enumerate((crop, draw) for crop in (0, 1) for draw in draws):
        place = permuted_index(2 * (draw - step.first) + crop, num_crops, order)
        if place >= len(edges) - 1:
            continue
        low, high = edges[place], edges[place + 1]
        rng = random_for(seed, "mask", draw, crop)
        ratio = low + (high - low) * np.float32(rng.random())
        rows[row] = masks.generator(int(np.float32(masks.n_tokens) * ratio), rng=rng).reshape(-1)
        upperbound += int(np.float32(masks.n_tokens) * high)
    return rows, upperbound


@lru_cache(maxsize=4)
def _edges(ratios: tuple[float, ...], num_masked: int) -> np.ndarray:
    """Return the float32 bin edges, identical to those of ``collate.draw_masks``."""
    return torch.linspace(*ratios, num_masked + 1).numpy()
