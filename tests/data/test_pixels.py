"""Every pixel operation against Pillow with the same parameters."""

import colorsys
import random

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.data import pixels as ops
from tests.data import reference
from tests.data.pictures import picture, planes

PICTURES = [picture(64, 64, seed) for seed in range(4)] + [picture(96, 96, 9)]


def differences(ours, reference_of, parameters, pictures=PICTURES):
    """Return ours minus reference over all pictures and parameters, one flat float array."""
    found = []
    for image in pictures:
        for parameter in parameters:
            mine = np.broadcast_to(ours(planes(image), parameter), (3, *image.size[::-1]))
            assert mine.dtype == np.uint8
            found.append((mine.astype(float) - planes(reference_of(image, parameter))).ravel())
    return np.concatenate(found)


def uniform(low: float, high: float, number: int = 12) -> list[float]:
    rng = random.Random(0)
    return [rng.uniform(low, high) for _ in range(number)]


@pytest.mark.parametrize("ours, theirs, low, high, mean, most", [
    (ops.adjust_brightness, reference.brightness, 0.6, 1.4, 0.12, 1),
    (ops.adjust_brightness, reference.brightness, 0.0, 3.0, 0.25, 2),
    (ops.adjust_contrast, reference.contrast, 0.6, 1.4, 0.15, 1),
    (ops.adjust_contrast, reference.contrast, 0.0, 3.0, 0.25, 2),
    (ops.adjust_saturation, reference.saturation, 0.8, 1.2, 0.05, 1),
    (ops.adjust_saturation, reference.saturation, 0.0, 3.0, 0.25, 3),
    (ops.adjust_hue, reference.hue, -0.1, 0.1, 0.6, 9),
    (ops.adjust_hue, reference.hue, -0.5, 0.5, 0.8, 14),
    (ops.gaussian_blur, reference.gaussian_blur, 0.1, 2.0, 0.25, 2),
])  # fmt: skip
def test_operation_equals_pillow_within(ours, theirs, low, high, mean, most):
    difference = differences(ours, theirs, uniform(low, high))
    assert np.abs(difference).mean() < mean
    assert np.abs(difference).max() <= most
    assert abs(difference.mean()) < 0.2, "biased"


def test_grayscale_is_within_one_level():
    difference = differences(lambda x, _: ops.grayscale(x), lambda x, _: reference.grayscale(x), [None])
    assert np.abs(difference).max() <= 1 and np.abs(difference).mean() < 0.15
    ramp = np.tile(np.arange(256, dtype=np.uint8), (3, 2, 1))
    np.testing.assert_array_equal(ops.grayscale(ramp)[0], ramp[0])


def test_solarize_is_exact_at_any_threshold():
    assert not differences(lambda x, _: ops.solarize(x), lambda x, _: reference.solarize(x), [None]).any()
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    for threshold in (0, 1, 100, 128, 129, 255):
        expected = [i if i < threshold else 255 - i for i in range(256)]
        assert ops.solarize(levels, threshold).ravel().tolist() == expected


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation"])
def test_factor_one_changes_nothing_and_huge_factors_saturate(name):
    image = planes(PICTURES[0])
    operation = getattr(ops, name)
    np.testing.assert_array_equal(operation(image, 1.0), image)
    change = np.abs(operation(image, 500.0).astype(float) - planes(reference.JITTER[name[7:]](PICTURES[0], 500.0)))
    # a factor of 500 makes a whole number of the rounding of the grey level
    assert change.mean() < (3 if name == "adjust_saturation" else 0.1)


def test_hue_of_pure_colours_and_greys():
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (90, 90, 90)}
    images = {
        name: np.full((3, 2, 2), 0, np.uint8) + np.array(c, np.uint8)[:, None, None] for name, c in colours.items()
    }
    np.testing.assert_allclose(ops.adjust_hue(images["red"], 1 / 3), images["green"], atol=10)
    np.testing.assert_allclose(ops.adjust_hue(images["red"], -1 / 3), images["blue"], atol=10)
    for shift in (-0.5, -0.07, 0.1, 0.5):
        np.testing.assert_array_equal(ops.adjust_hue(images["grey"], shift), images["grey"])
    for image in images.values():
        np.testing.assert_array_equal(ops.adjust_hue(image, 0.003), image)


@pytest.mark.parametrize("shift", [-0.4, -0.1, -0.05, 0.03, 0.08, 0.1, 0.5])
def test_hue_is_the_exact_turn_of_the_hexagon_rounded(shift):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 20), dtype=np.uint8)
    steps = int(shift * 255)
    turn = (steps - 0.5) / 255
    exact = np.empty((3, 20, 20))
    for place in np.ndindex(20, 20):
        h, s, v = colorsys.rgb_to_hsv(*(pixels[(slice(None), *place)] / 255))
        exact[(slice(None), *place)] = np.multiply(colorsys.hsv_to_rgb((h + turn) % 1, s, v), 255)
    difference = ops.adjust_hue(pixels, shift) - exact
    assert np.abs(difference).max() < 0.51 and np.abs(difference).mean() < 0.1


def test_hue_keeps_value_and_chroma():
    image = planes(PICTURES[1])
    for shift in (-0.31, -0.1, 0.05, 0.09, 0.4):
        turned = ops.adjust_hue(image, shift)
        np.testing.assert_array_equal(turned.max(0), image.max(0))
        np.testing.assert_array_equal(turned.min(0), image.min(0))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 6, 9])
def test_blur_of_images_smaller_than_the_kernel(side):
    image = picture(side, side, 3) if side > 1 else Image.new("RGB", (1, 1), (9, 80, 200))
    blurred = ops.gaussian_blur(planes(image), 1.7)
    assert np.abs(blurred.astype(int) - planes(reference.gaussian_blur(image, 1.7)).astype(int)).max() <= 2


def test_blur_with_a_tiny_sigma_changes_nothing():
    image = planes(PICTURES[2])
    np.testing.assert_array_equal(ops.gaussian_blur(image, 0.1), image)


def test_normalize_equals_the_formula_and_repeats_grey():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = PICTURES[0]
    ours = ops.normalize(planes(image), mean, std)
    torch.testing.assert_close(ours, reference.normalize(image, mean, std), atol=2e-6, rtol=1e-5)
    grey = ops.normalize(ops.grayscale(planes(image)), (0, 0, 0), (1, 1, 1))
    assert grey.shape == (3, 64, 64) and torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])


def test_operations_leave_their_input_alone():
    image = planes(PICTURES[0])
    before = image.copy()
    for operation, parameter in [
        (ops.adjust_brightness, 1.3), (ops.adjust_contrast, 0.7), (ops.adjust_saturation, 1.1),
        (ops.adjust_hue, 0.1), (ops.gaussian_blur, 1.0), (ops.solarize, 128),
    ]:  # fmt: skip
        operation(image, parameter)
        np.testing.assert_array_equal(image, before)
