"""Masks of a step: upstream's distribution over the whole step, whatever part of it is asked for."""

import random

import numpy as np
import pytest

from dinov2_custom.data.collate import draw_masks
from dinov2_custom.data.masking import MaskingGenerator
from dinov2_custom.data.step_masks import Masks, Step, masks_of_draws

GRID = 16


def make(probability=0.5, ratios=(0.1, 0.5)):
    generator = MaskingGenerator((GRID, GRID), max_num_patches=0.5 * GRID * GRID)
    return Masks(ratios, probability, GRID * GRID, generator)


@pytest.mark.parametrize("probability, size, masked", [(0.5, 8, 8), (0.3, 5, 3), (1.0, 4, 8), (0.0, 4, 0), (0.9, 1, 1)])
def test_upstreams_share_of_a_steps_crops_is_masked(probability, size, masked):
    for first in (0, 40, 7):
        rows, upperbound = masks_of_draws(make(probability), 0, Step(first, size), range(first, first + size))
        assert rows.shape == (2 * size, GRID * GRID) and rows.dtype == bool
        assert int(rows.any(1).sum()) == masked and rows.sum() <= upperbound


def test_any_part_of_a_step_has_the_masks_it_has_in_the_whole():
    step = Step(24, 8)
    whole, bound = masks_of_draws(make(), 3, step, range(24, 32))
    whole = whole.reshape(2, 8, -1)
    bounds = 0
    for first, last in ((24, 25), (25, 29), (29, 32)):
        part, part_bound = masks_of_draws(make(), 3, step, range(first, last))
        assert np.array_equal(part.reshape(2, last - first, -1), whole[:, first - 24 : last - 24])
        bounds += part_bound
    assert bounds == bound


def test_sizes_have_the_distribution_of_upstreams_collate_function():
    """One crop in each bin of the ratios: the sorted sizes of both are equal on average, bin by bin."""
    steps, size = 300, 8
    ours = [masks_of_draws(make(), 0, Step(n * size, size), range(n * size, (n + 1) * size)) for n in range(steps)]
    rng, m = random.Random(0), make()
    theirs = [draw_masks(2 * size, m.ratios, m.probability, m.n_tokens, m.generator, rng) for _ in range(steps)]
    assert {bound for _, bound in ours} == {bound for _, bound in theirs}
    mean = [np.mean([np.sort(np.asarray(rows).sum(1)) for rows, _ in one], axis=0) for one in (ours, theirs)]
    assert np.abs(mean[0] - mean[1]).max() < 1.5  # of 256 patches


def test_every_crop_is_masked_as_often_as_another_and_with_every_ratio():
    size, steps = 4, 600
    hit, sizes = np.zeros(2 * size), [[] for _ in range(2 * size)]
    for n in range(steps):
        rows, _ = masks_of_draws(make(), 1, Step(n * size, size), range(n * size, (n + 1) * size))
        hit += rows.any(1)
        for crop, count in enumerate(rows.sum(1)):
            sizes[crop] += [count] if count else []
    assert np.abs(hit / steps - 0.5).max() < 0.08  # four standard deviations
    assert all(min(one) < 0.15 * 256 and max(one) > 0.45 * 256 for one in sizes)
    assert np.ptp([np.mean(one) for one in sizes]) < 0.05 * 256


def test_seed_and_step_change_the_masks():
    one = masks_of_draws(make(), 0, Step(0, 8), range(8))[0]
    assert not np.array_equal(one, masks_of_draws(make(), 1, Step(0, 8), range(8))[0])
    assert not np.array_equal(one, masks_of_draws(make(), 0, Step(8, 8), range(8, 16))[0])
