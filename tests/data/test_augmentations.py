"""The complete augmentation: shapes, recipe, determinism, and agreement with Pillow for equal parameters."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.data import DataAugmentationDINO
from dinov2_custom.data.augmentations import as_pixels
from dinov2_custom.data.pixels import change_colours, cut_crops
from dinov2_custom.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tests.data import reference
from tests.data.pictures import picture, planes

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "blood_cells"
SCALES = ((0.32, 1.0), (0.05, 0.32))


def make(local_crops_number: int = 3, **options) -> DataAugmentationDINO:
    return DataAugmentationDINO(*SCALES, local_crops_number, global_crops_size=32, local_crops_size=16, **options)


def test_output_has_upstreams_keys_shapes_and_sharing():
    crops = make()(picture(60, 50), rng=random.Random(0))
    assert list(crops) == ["global_crops", "global_crops_teacher", "local_crops", "offsets"]
    assert [tuple(c.shape) for c in crops["global_crops"]] == [(3, 32, 32)] * 2
    assert [tuple(c.shape) for c in crops["local_crops"]] == [(3, 16, 16)] * 3
    assert all(c.dtype == torch.float32 for c in crops["global_crops"] + crops["local_crops"])
    assert all(a is b for a, b in zip(crops["global_crops"], crops["global_crops_teacher"], strict=True))
    assert crops["offsets"] == ()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (300, 2), (7, 9), (33, 31)])
@pytest.mark.parametrize("number", [0, 1, 4])
def test_images_of_any_size_and_no_local_crops_work(size, number):
    crops = make(number)(Image.new("RGB", size, (10, 200, 30)), rng=random.Random(0))
    assert len(crops["local_crops"]) == number
    assert all(torch.isfinite(c).all() for c in crops["global_crops"] + crops["local_crops"])


def test_same_stream_gives_the_same_crops_and_none_a_fresh_one():
    augment, image = make(), picture(60, 50)
    state = random.getstate()
    first, second = (augment(image, rng=random.Random(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first["local_crops"], second["local_crops"], strict=True))
    fresh, other = augment(image), augment(image)
    assert not torch.equal(fresh["global_crops"][0], other["global_crops"][0])
    assert random.getstate() == state, "the global stream was used"


def test_arrays_and_other_modes_are_taken_too():
    augment, image = make(1), picture(60, 50)
    expected = augment(image, rng=random.Random(0))["global_crops"][0]
    assert torch.equal(augment(np.array(image), rng=random.Random(0))["global_crops"][0], expected)
    assert augment(image.convert("L"), rng=random.Random(0))["global_crops"][0].shape == (3, 32, 32)


def test_recipe_of_each_crop_is_upstreams():
    augment = make(2)
    draws = [augment.draw(60, 50, random.Random(seed)) for seed in range(3000)]

    def rates(crop: int) -> list[float]:
        flags = [
            (d[crop].flip, bool(d[crop].jitter), d[crop].gray, d[crop].sigma is not None, d[crop].solarize)
            for d in draws
        ]
        return np.mean(flags, axis=0).tolist()

    for crop, blur, solarize in [(0, 0.0, 0.0), (1, 0.9, 0.2), (2, 0.5, 0.0), (3, 0.5, 0.0)]:
        np.testing.assert_allclose(rates(crop), [0.5, 0.8, 0.2, blur, solarize], atol=0.04)
        assert (blur == 0) == (rates(crop)[3] == 0) and (solarize == 0) == (rates(crop)[4] == 0)
    areas = np.array([[d[crop].box[2] * d[crop].box[3] / 3000 for crop in range(4)] for d in draws])
    assert areas[:, :2].min() > 0.28 and areas[:, :2].max() == 1.0
    assert areas[:, 2:].min() < 0.08 and areas[:, 2:].max() < 0.34


def test_strengths_come_from_the_augmentation_section():
    off = dict(jitter_p=0, gray_p=0, solarize_p=0, blur_p=[0, 0, 0], hflip_p=0)
    draws = make(1, augmentation=off).draw(60, 50, random.Random(0))
    assert all(d[1:] == (False, (), False, None, False) for d in draws)
    on = dict(jitter_p=1, gray_p=1, solarize_p=1, blur_p=[1, 1, 1], hflip_p=1, hue=0, blur_sigma=[0.7, 0.7])
    draws = make(1, augmentation=on).draw(60, 50, random.Random(0))
    assert all(d.flip and d.gray and d.sigma == 0.7 and len(d.jitter) == 3 for d in draws)
    assert [d.solarize for d in draws] == [False, True, False]


def test_mean_and_std_are_used():
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    off = dict(jitter_p=0, gray_p=0, solarize_p=0, blur_p=[0, 0, 0])
    crops = make(0, augmentation=off, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0))(white, rng=random.Random(0))
    np.testing.assert_allclose(crops["global_crops"][0][:, 0, 0], [1.0, 1.5, 0.5], atol=1e-6)


def check_fidelity(image: Image.Image, seeds: range, size: int, local_size: int) -> tuple[float, float]:
    """Return the mean absolute and mean difference, in levels, between our crops and the slow reference."""
    augment = DataAugmentationDINO(*SCALES, 2, size, local_size)
    pixels, differences = as_pixels(image), []
    for seed in seeds:
        draws = augment.draw(*image.size, random.Random(seed))
        resized = [np.empty((side, side, 3), np.uint8) for side in augment.sizes]
        cut_crops(resized, pixels, draws)
        for crop, draw in zip(resized, draws, strict=True):
            ours = change_colours(np.ascontiguousarray(crop.transpose(2, 0, 1)), draw)
            slow = planes(reference.render(image, draw, len(crop)))
            differences.append((np.broadcast_to(ours, slow.shape).astype(float) - slow).ravel())
    flat = np.concatenate(differences)
    return float(np.abs(flat).mean()), float(flat.mean())


def test_whole_chain_is_within_half_a_level_of_pillow():
    results = [check_fidelity(picture(160, 120, seed), range(seed * 10, seed * 10 + 10), 64, 32) for seed in range(4)]
    assert np.mean([mean for mean, _ in results]) < 0.5
    assert abs(np.mean([bias for _, bias in results])) < 0.15


@pytest.mark.skipif(not REAL.is_dir(), reason=f"NOT CHECKED ON PHOTOGRAPHS: no folder {os.path.relpath(REAL)}")
def test_whole_chain_is_within_half_a_level_of_pillow_on_photographs():
    files = sorted(REAL.rglob("*.jpg"))[::80]
    results = [check_fidelity(Image.open(f).convert("RGB"), range(i, i + 2), 112, 64) for i, f in enumerate(files)]
    assert len(results) >= 3 and np.mean([mean for mean, _ in results]) < 0.5


def test_normalised_crops_equal_the_reference_to_a_level():
    image, augment = picture(100, 80, 2), make(1)
    draws = augment.draw(100, 80, random.Random(1))
    crops = augment(image, rng=random.Random(1))
    for crop, draw in zip(crops["global_crops"], draws[:2], strict=True):
        slow = reference.normalize(reference.render(image, draw, 32), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        assert (crop - slow).abs().mean() < 1 / 255 / 0.22
