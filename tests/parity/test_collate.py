"""Masks and collated batches: equal to upstream's, draw for draw from the same stream."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dinov2_custom.data.collate import collate_data_and_cast
from dinov2_custom.data.masking import MaskingGenerator
from tests.oracle import preserved_rng


@pytest.mark.parametrize("grid, max_num_patches", [(16, 128), (14, 98), (37, 666), (7, 24.5), (4, 8)])
def test_masks_equal_upstream_draw_for_draw(oracle, grid, max_num_patches):
    theirs = oracle.masking.MaskingGenerator(input_size=(grid, grid), max_num_patches=max_num_patches)
    ours = MaskingGenerator(input_size=(grid, grid), max_num_patches=max_num_patches)
    stream = random.Random(5)
    with preserved_rng(5):
        for wanted in [0, 1, grid * grid // 10, grid * grid // 3, grid * grid // 2, grid * grid] * 5:
            expected = theirs(wanted)
            got = np.asarray(ours(wanted, rng=stream))
            assert got.dtype == bool
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("batch_size, num_locals, probability", [(1, 8, 0.5), (4, 2, 0.5), (5, 8, 0.3), (3, 1, 1.0)])
@pytest.mark.parametrize("own_stream", [True, False])
def test_collate_equals_upstream(oracle, batch_size, num_locals, probability, own_stream):
    generator = torch.Generator().manual_seed(0)
    samples = [
        (
            {
                "global_crops": [torch.randn(3, 28, 28, generator=generator) for _ in range(2)],
                "local_crops": [torch.randn(3, 14, 14, generator=generator) for _ in range(num_locals)],
                "offsets": (),
            },
            (),
        )
        for _ in range(batch_size)
    ]
    arguments = dict(mask_ratio_tuple=(0.1, 0.5), mask_probability=probability, dtype=torch.float32, n_tokens=256)
    with preserved_rng(7):
        theirs = oracle.masking.MaskingGenerator(input_size=(16, 16), max_num_patches=128)
        expected = oracle.collate.collate_data_and_cast(samples, mask_generator=theirs, **arguments)
    with preserved_rng(7):
        rng = random.Random(7) if own_stream else None
        ours = MaskingGenerator(input_size=(16, 16), max_num_patches=128)
        got = collate_data_and_cast(samples, mask_generator=ours, rng=rng, **arguments)
    assert set(got) >= set(expected)
    for name, value in expected.items():
        if torch.is_tensor(value):
            assert got[name].dtype == value.dtype, name
            assert torch.equal(got[name], value), name
        else:
            assert got[name] == value, name
