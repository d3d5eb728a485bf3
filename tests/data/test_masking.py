"""Masks: identical to upstream's draw for draw, and their own guarantees."""

import random

import numpy as np
import pytest

from dinov2_custom.data.collate import draw_masks
from dinov2_custom.data.masking import MaskingGenerator, Masks, Step, masks_of_draws


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (4, 7), (6, 6), (14, 14), (16, 16), (37, 37)])
def test_same_stream_gives_upstreams_masks(upstream_data, grid):
    num_patches = grid[0] * grid[1]
    limits = {"max_num_patches": 0.5 * num_patches}
    ours, theirs = MaskingGenerator(grid, **limits), upstream_data("masking").MaskingGenerator(grid, **limits)
    wanted = random.Random(0)
    state = random.getstate()
    try:
        for seed in range(60):
            count = int(num_patches * wanted.uniform(0.0, 0.7))
            random.seed(seed)
            expected, after = theirs(count), random.random()
            rng = random.Random(seed)
            np.testing.assert_array_equal(ours(count, rng=rng), expected)
            assert rng.random() == after, "another number of draws"
            random.seed(seed)
            np.testing.assert_array_equal(ours(count), expected, err_msg="rng=None is the global stream")
    finally:
        random.setstate(state)


def test_same_stream_with_other_shapes_of_rectangles(upstream_data):
    options = {"num_masking_patches": 40, "min_num_patches": 2, "min_aspect": 0.5, "max_aspect": 3.0}
    ours, theirs = MaskingGenerator(12, **options), upstream_data("masking").MaskingGenerator(12, **options)
    state = random.getstate()
    try:
        for seed in range(40):
            random.seed(seed)
            expected = theirs(60)
            np.testing.assert_array_equal(ours(60, rng=random.Random(seed)), expected)
    finally:
        random.setstate(state)


def test_mask_reaches_its_size_and_never_more():
    generator = MaskingGenerator((16, 16), max_num_patches=128)
    sizes = [int(generator(100, rng=random.Random(seed)).sum()) for seed in range(200)]
    assert max(sizes) <= 100 and np.mean(sizes) > 98


def test_zero_patches_is_an_empty_mask_without_draws():
    rng = random.Random(3)
    state = rng.getstate()
    mask = MaskingGenerator((5, 6))(0, rng=rng)
    assert mask.shape == (5, 6) and mask.dtype == bool and not mask.any() and rng.getstate() == state


def test_tiny_grids_may_stay_empty_but_never_fail():
    masks = [MaskingGenerator((1, 1), max_num_patches=0.5)(1, rng=random.Random(seed)) for seed in range(20)]
    assert not np.any(masks)
    two_by_two = [MaskingGenerator((2, 2), max_num_patches=2)(2, rng=random.Random(seed)).any() for seed in range(200)]
    assert any(two_by_two) and not all(two_by_two)


def test_without_a_bound_a_rectangle_may_have_all_that_is_missing():
    assert MaskingGenerator(8).max_num_patches == 64
    assert MaskingGenerator(8, num_masking_patches=20).max_num_patches == 20
    assert MaskingGenerator((8, 9)).get_shape() == (8, 9)
    assert "8 x 9" in repr(MaskingGenerator((8, 9)))


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
