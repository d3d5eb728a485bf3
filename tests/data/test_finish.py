"""Finishing on the device gives exactly the pixels and normalisation of the CPU path."""

import random

import numpy as np
import pytest
import torch

from dinov2_custom.data import pixels as ops
from dinov2_custom.data.augmentations import DataAugmentationDINO, as_pixels
from dinov2_custom.data.draws import CropDraw
from dinov2_custom.data.finish import NUM_PARAMETERS, Finisher, apply_colours, pack_draw
from dinov2_custom.data.pixels import change_colours, cut_crops
from dinov2_custom.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tests.data.pictures import picture, planes
from tests.data.test_pixels import STRONG

BOX = (0, 0, 1, 1)


def rows_of(draws) -> np.ndarray:
    rows = np.full((len(draws), NUM_PARAMETERS), np.nan, np.float32)
    for draw, row in zip(draws, rows, strict=True):
        pack_draw(draw, row)
    return rows


def on_device(images: list[np.ndarray], draws) -> np.ndarray:
    levels = torch.from_numpy(np.stack(images)).float()
    apply_colours(levels, rows_of(draws))
    return levels.numpy()


def on_cpu(image: np.ndarray, draw: CropDraw) -> np.ndarray:
    """Apply the colour changes of ``draw`` with the operations of the CPU path."""
    return np.broadcast_to(change_colours(image, draw), image.shape)


@pytest.mark.parametrize("recipe", [None, STRONG], ids=["upstream", "strong"])
@pytest.mark.parametrize("size", [32, 9, 4])
def test_whole_chain_has_the_levels_of_the_cpu_path(recipe, size):
    augment = DataAugmentationDINO((0.32, 1), (0.05, 0.32), 6, augmentation=recipe)
    draws = [draw._replace(flip=False) for seed in range(25) for draw in augment.draw(size, size, random.Random(seed))]
    images = [planes(picture(size, size, seed)) for seed in range(len(draws))]
    got = on_device(images, draws)
    assert sum(bool(draw.jitter) for draw in draws) > 100 and sum(draw.sigma is not None for draw in draws) > 50
    for image, draw, levels in zip(images, draws, got, strict=True):
        np.testing.assert_array_equal(levels, on_cpu(image, draw), err_msg=str(draw))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_colour_change_over_its_whole_range(name):
    values = np.linspace(-0.5, 0.5, 41) if name == "hue" else np.linspace(0, 3, 41)
    draws = [CropDraw(BOX, False, ((name, float(value)),), False, None, False) for value in values]
    images = [planes(picture(24, 24, seed)) for seed in range(len(draws))]
    for image, draw, levels in zip(images, draws, on_device(images, draws), strict=True):
        np.testing.assert_array_equal(levels, on_cpu(image, draw), err_msg=str(draw))


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.3, 2.0, 9.0])
def test_blur_of_every_width(sigma):
    draw = CropDraw(BOX, False, (), False, sigma, False)
    image = planes(picture(31, 31, 3))
    np.testing.assert_array_equal(on_device([image], [draw])[0], ops.gaussian_blur(image, sigma))


def test_no_change_and_mixed_orders_do_not_affect_other_crops():
    nothing = CropDraw(BOX, False, (), False, None, False)
    forwards = nothing._replace(jitter=(("brightness", 1.4), ("hue", 0.1), ("contrast", 0.6), ("saturation", 0.8)))
    backwards = nothing._replace(jitter=forwards.jitter[::-1])
    assert not rows_of([nothing]).any()
    image = planes(picture(16, 16, 0))
    got = on_device([image] * 4, [nothing, forwards, backwards, nothing])
    np.testing.assert_array_equal(got[0], image)
    np.testing.assert_array_equal(got[3], image)
    np.testing.assert_array_equal(got[1], on_cpu(image, forwards))
    np.testing.assert_array_equal(got[2], on_cpu(image, backwards))
    assert (got[1] != got[2]).any()


def test_normalised_crops_are_those_of_the_float_path_bit_for_bit():
    augment = DataAugmentationDINO((0.32, 1), (0.05, 0.32), 0, 32)
    image = as_pixels(picture(60, 50))
    draws = augment.draw(60, 50, random.Random(3))
    resized = np.empty((2, 32, 32, 3), np.uint8)
    cut_crops(list(resized), image, draws)
    finish = Finisher(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    late = finish(torch.from_numpy(resized), torch.device("cpu"), rows_of(draws))
    assert late.dtype == torch.float32 and late.is_contiguous()
    assert torch.equal(late, torch.stack(augment(image.numpy(), random.Random(3))["global_crops"]))

    changed = [
        change_colours(np.ascontiguousarray(x.transpose(2, 0, 1)), d) for x, d in zip(resized, draws, strict=True)
    ]
    crops = torch.from_numpy(np.stack([np.broadcast_to(crop, (3, 32, 32)) for crop in changed]))
    assert torch.equal(finish(crops, "cpu"), late)
    half = Finisher(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, torch.float16)(crops, "cpu")
    assert torch.equal(half, late.half())
