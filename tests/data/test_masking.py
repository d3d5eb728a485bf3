"""Masks: draw for draw upstream's, and their own promises."""

import random

import numpy as np
import pytest

from dinov2_custom.data.masking import MaskingGenerator


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
