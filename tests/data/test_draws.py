"""Distributions of the drawn parameters, compared with the rules and with a second implementation of them."""

import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from dinov2_custom.data.draws import Recipe, draw_box, draw_crop, draw_jitter

NUMBER = 4000
# distance of two empirical distributions of NUMBER values that one pair in 10,000 exceeds
KS_LIMIT = 2.23 * math.sqrt(2 / NUMBER)


def ks_distance(a, b) -> float:
    """Return the maximum difference of the two empirical distribution functions."""
    a, b = np.sort(a), np.sort(b)
    places = np.concatenate([a, b])
    return float(
        np.abs(np.searchsorted(a, places, "right") / len(a) - np.searchsorted(b, places, "right") / len(b)).max()
    )


def slow_box(rng: np.random.Generator, width: int, height: int, scale) -> tuple[int, int, int, int]:
    """Draw a box by the same rule, with another generator and other functions."""
    for _ in range(10):
        area = rng.uniform(*scale) * width * height
        aspect = (3 / 4) * (16 / 9) ** rng.uniform()
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 1 <= w <= width and 1 <= h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    aspect = min(max(width / height, 3 / 4), 4 / 3)
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("width, height", [(500, 375), (224, 224), (300, 1000)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_have_the_specified_distribution(width, height, scale):
    ours = [draw_box(rng, width, height, scale) for rng in [random.Random(1)] for _ in range(NUMBER)]
    rng = np.random.default_rng(1)
    theirs = [slow_box(rng, width, height, scale) for _ in range(NUMBER)]
    for name, value in {
        "left": lambda b: b[0], "top": lambda b: b[1], "width": lambda b: b[2], "height": lambda b: b[3],
        "area": lambda b: b[2] * b[3], "aspect": lambda b: b[2] / b[3],
    }.items():  # fmt: skip
        assert ks_distance([value(b) for b in ours], [value(b) for b in theirs]) < KS_LIMIT, name


@pytest.mark.parametrize("width, height", [(1, 1), (1, 500), (500, 1), (3, 2), (7, 400), (640, 480)])
def test_boxes_lie_inside_any_image(width, height):
    rng = random.Random(0)
    for scale in ((0.32, 1.0), (0.05, 0.32), (1.0, 1.0)):
        for _ in range(100):
            left, top, w, h = draw_box(rng, width, height, scale)
            assert w >= 1 and h >= 1 and 0 <= left <= width - w and 0 <= top <= height - h


def test_fallback_is_the_largest_centred_box_with_an_allowed_aspect():
    rng = random.Random(0)
    assert draw_box(rng, 1000, 100, (1.0, 1.0)) == (433, 0, 133, 100)
    assert draw_box(rng, 90, 1000, (1.0, 1.0)) == (0, 440, 90, 120)
    assert draw_box(rng, 100, 100, (2.0, 2.0)) == (0, 0, 100, 100)


def test_jitter_is_uniform_in_its_ranges_and_its_order_is_a_random_permutation():
    rng = random.Random(0)
    draws = [draw_jitter(rng, Recipe()) for _ in range(NUMBER)]
    flat = np.random.default_rng(0).uniform(size=NUMBER)
    for name, low, high in [
        ("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)
    ]:  # fmt: skip
        values = np.array([dict(draw)[name] for draw in draws])
        assert low <= values.min() and values.max() <= high
        assert ks_distance((values - low) / (high - low), flat) < KS_LIMIT, name
    orders = Counter(tuple(name for name, _ in draw) for draw in draws)
    assert len(orders) == math.factorial(4)
    expected = NUMBER / 24
    assert sum((n - expected) ** 2 / expected for n in orders.values()) < 56  # chi square, 23 df, p about 1e-4


def test_strength_zero_leaves_an_operation_out_and_factors_are_never_negative():
    rng = random.Random(0)
    recipe = Recipe(brightness=3.0, contrast=0, saturation=0, hue=0)
    draws = [draw_jitter(rng, recipe) for _ in range(200)]
    assert {name for draw in draws for name, _ in draw} == {"brightness"}
    assert min(factor for draw in draws for _, factor in draw) >= 0
    assert draw_jitter(rng, Recipe(brightness=0, contrast=0, saturation=0, hue=0)) == ()


def rate(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


@pytest.mark.parametrize("blur_p, solarize_p", [(0.0, 0.0), (0.9, 0.2), (0.5, 0.0), (1.0, 1.0)])
def test_rates_of_random_operations(blur_p, solarize_p):
    rng = random.Random(2)
    draws = [draw_crop(rng, 50, 40, (0.3, 1.0), Recipe(), blur_p, solarize_p) for _ in range(NUMBER)]

    def near(measured: float, p: float) -> bool:
        return abs(measured - p) <= 4 * math.sqrt(p * (1 - p) / NUMBER)

    assert near(rate(d.flip for d in draws), 0.5)
    assert near(rate(bool(d.jitter) for d in draws), 0.8)
    assert near(rate(d.gray for d in draws), 0.2)
    assert near(rate(d.sigma is not None for d in draws), blur_p)
    assert near(rate(d.solarize for d in draws), solarize_p)
    sigmas = [(d.sigma - 0.1) / 1.9 for d in draws if d.sigma is not None]
    if sigmas:
        flat = np.random.default_rng(0).uniform(size=NUMBER)
        assert ks_distance(sigmas, flat) < 2.23 * math.sqrt(1 / len(sigmas) + 1 / NUMBER)


def test_choices_of_a_crop_are_independent():
    rng = random.Random(3)
    draws = [draw_crop(rng, 50, 40, (0.3, 1.0), Recipe(), 0.5, 0.5) for _ in range(NUMBER)]
    columns = np.array(
        [[d.flip, bool(d.jitter), d.gray, d.sigma is not None, d.solarize, d.box[2]] for d in draws], float
    )
    correlation = np.corrcoef(columns.T)
    assert max(abs(correlation[i, j]) for i, j in itertools.combinations(range(6), 2)) < 4.5 / math.sqrt(NUMBER)


def test_same_stream_gives_the_same_draw():
    first, second = (draw_crop(random.Random(5), 50, 40, (0.3, 1.0), Recipe(), 0.5, 0.5) for _ in range(2))
    assert first == second != draw_crop(random.Random(6), 50, 40, (0.3, 1.0), Recipe(), 0.5, 0.5)


def test_recipe_reads_mappings_objects_and_none():
    assert Recipe.from_config(None) == Recipe()
    assert Recipe.from_config({"hue": 0.2, "blur_p": [1.0, 0.1, 0.5]}) == Recipe(hue=0.2, blur_p=(1.0, 0.1, 0.5))
    assert Recipe.from_config(SimpleNamespace(gray_p=0.0, device="auto")) == Recipe(gray_p=0.0)
    assert Recipe.from_config(Recipe(hue=0.3)).hue == 0.3


def test_a_recipe_has_no_other_keys():
    with pytest.raises(TypeError, match="grey_p"):
        Recipe.from_config({"grey_p": 0.1, "device": "cpu"})
