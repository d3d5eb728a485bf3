"""Collate: upstream's output for the same random stream, and inputs that upstream does not accept."""

import random

import pytest
import torch

from dinov2_custom.data.collate import collate_data_and_cast
from dinov2_custom.data.masking import MaskingGenerator
from dinov2_custom.errors import DataError


def make_samples(number: int, num_local: int, size: int = 16, local: int = 8, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)

    def crops(count: int, side: int) -> list[torch.Tensor]:
        return [torch.randn(3, side, side, generator=generator) for _ in range(count)]

    return [
        {"global_crops": crops(2, size), "local_crops": crops(num_local, local), "offsets": ()} for _ in range(number)
    ]


def collate(samples, probability=0.5, ratio=(0.1, 0.5), grid=4, dtype=torch.float32, rng=None):
    masks = MaskingGenerator((grid, grid), max_num_patches=0.5 * grid * grid)
    return collate_data_and_cast(samples, ratio, probability, dtype, grid * grid, masks, rng=rng)


@pytest.mark.parametrize("batch, probability, ratio, grid, dtype", [
    (1, 0.5, (0.1, 0.5), 4, torch.float32),
    (2, 0.5, (0.1, 0.5), 16, torch.float16),
    (5, 0.7, (0.1, 0.5), 14, torch.bfloat16),
    (8, 1.0, (0.3, 0.45), 16, torch.float32),
    (3, 0.0, (0.1, 0.5), 16, torch.float32),
    (4, 1.0, (0.07, 0.1), 4, torch.float32),
    (16, 0.5, (0.1, 0.5), 37, torch.float32),
])  # fmt: skip
def test_all_outputs_equal_upstreams(upstream_data, batch, probability, ratio, grid, dtype):
    theirs = upstream_data("collate").collate_data_and_cast
    masks = upstream_data("masking").MaskingGenerator((grid, grid), max_num_patches=0.5 * grid * grid)
    samples = make_samples(batch, num_local=3)
    state = random.getstate()
    try:
        for seed in range(12):
            random.seed(seed)
            expected = theirs([(s, ()) for s in samples], ratio, probability, dtype, grid * grid, masks)
            ours = collate(samples, probability, ratio, grid, dtype, rng=random.Random(seed))
            assert ours.keys() == expected.keys()
            for key, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert ours[key].dtype == value.dtype, key
                    assert torch.equal(ours[key], value), key
                else:
                    assert type(ours[key]) is type(value) and ours[key] == value, key
    finally:
        random.setstate(state)


def test_no_rng_means_the_global_stream():
    samples = make_samples(2, num_local=1)
    state = random.getstate()
    try:
        random.seed(7)
        drawn = collate(samples)["collated_masks"]
    finally:
        random.setstate(state)
    assert torch.equal(drawn, collate(samples, rng=random.Random(7))["collated_masks"])


def test_crops_are_stacked_crop_by_crop():
    samples = make_samples(3, num_local=2)
    batch = collate(samples, rng=random.Random(0))
    assert torch.equal(batch["collated_global_crops"][3], samples[0]["global_crops"][1])
    assert torch.equal(batch["collated_local_crops"][4], samples[1]["local_crops"][1])


def test_dicts_and_pairs_give_the_same():
    samples = make_samples(2, num_local=1)
    bare = collate(samples, rng=random.Random(0))
    pairs = collate([(s, "label") for s in samples], rng=random.Random(0))
    assert all(torch.equal(bare[key], pairs[key]) for key in bare if key != "upperbound")


def test_no_local_crops_gives_an_empty_tensor():
    batch = collate(make_samples(2, num_local=0), dtype=torch.float16, rng=random.Random(0))
    assert batch["collated_local_crops"].shape == (0, 3, 16, 16)
    assert batch["collated_local_crops"].dtype == torch.float16


@pytest.mark.parametrize("probability, grid", [(0.0, 4), (0.5, 1)])
def test_no_masked_patch_gives_empty_tensors(probability, grid):
    batch = collate(make_samples(2, num_local=1), probability=probability, grid=grid, rng=random.Random(0))
    assert batch["mask_indices_list"].shape == (0,) and batch["mask_indices_list"].dtype == torch.int64
    assert batch["masks_weight"].shape == (0,) and batch["masks_weight"].dtype == torch.float32
    assert batch["n_masked_patches"].tolist() == [0] and not batch["collated_masks"].any()


def test_weights_of_a_masked_crop_sum_to_one_and_the_bound_holds():
    for seed in range(20):
        batch = collate(make_samples(4, num_local=1), grid=16, rng=random.Random(seed))
        masks = batch["collated_masks"]
        crop_of = batch["mask_indices_list"] // masks.shape[1]
        sums = torch.zeros(len(masks)).index_add_(0, crop_of, batch["masks_weight"])
        torch.testing.assert_close(sums, masks.any(1).float())
        assert int(masks.any(1).sum()) == 4
        assert batch["n_masked_patches"].item() == len(crop_of) <= batch["upperbound"]


def test_samples_without_augmentation_are_refused():
    with pytest.raises(DataError, match="got Tensor"):
        collate([(torch.zeros(3, 8, 8), 1)])
