"""The masks of one optimizer step, each found on its own: from (seed, step, draw) to the mask of a crop.

Upstream masks a share of the crops of one process's batch and spreads their ratios evenly over a range. Here the batch
is that of the whole step, over all processes and accumulated batches, so how these are cut does not matter. Not in
here: the shape of one mask (``masking``), upstream's collate function (``collate``). Read :func:`masks_of_draws` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from dinov2_custom.utils.rng import random_for, seed_for

from .samplers import permuted_index


class Masks(NamedTuple):
    """How the masks of a step are drawn: ``probability`` of its crops are masked, the ratios spread over ``ratios``.

    ``generator(n, rng=)`` gives a mask of at most n of the ``n_tokens`` patches.
    """

    ratios: Sequence[float]
    probability: float
    n_tokens: int
    generator: Callable[..., np.ndarray]


class Step(NamedTuple):
    """The draws of one optimizer step: ``size`` of them from number ``first`` on."""

    first: int
    size: int


def masks_of_draws(masks: Masks, seed: int, step: Step, draws: Sequence[int]) -> tuple[np.ndarray, int]:
    """Return the masks (2 * len(draws), n_tokens) bool of the global crops of ``draws``, and an upper bound of True.

    Rows are crop-major: all draws' first crops, then all their second ones. Of the step's 2 * size crops a permutation
    takes ``int(2 * size * probability)``; the j-th of them has its ratio in the j-th of as many equal bins.
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
    """Return the float32 borders of the bins, as ``collate.draw_masks`` has them."""
    return torch.linspace(*ratios, num_masked + 1).numpy()
