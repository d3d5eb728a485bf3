"""Draw the random parameters of one crop from an explicit ``random.Random``.

The distributions are those of upstream's ``DataAugmentationDINO`` (torchvision's RandomResizedCrop, ColorJitter,
RandomHorizontalFlip, RandomGrayscale, RandomSolarize). The strengths are in :class:`Recipe`, whose fields are the keys
of the ``augmentation`` section.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Box = tuple[int, int, int, int]
Jitter = tuple[tuple[str, float], ...]
OTHER_KEYS = ("device",)  # keys of the same section that do not belong to the recipe
_SEQUENCES = ("blur_p", "blur_sigma")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Strengths and probabilities of the colour changes.

    brightness, contrast, saturation: factors are drawn from 1 +- this (at least 0). hue: shift drawn from +- this, in
    turns (at most 0.5). ``*_p`` are the probabilities actually applied; ``blur_p`` is for (global 1, global 2, local),
    and its default matches the effect of upstream's inverted GaussianBlur. blur_sigma: range in pixels.

    Source: upstream data/augmentations.py and data/transforms.py.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_p: float = 0.8
    gray_p: float = 0.2
    solarize_p: float = 0.2
    blur_p: tuple[float, float, float] = (0.0, 0.9, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    hflip_p: float = 0.5

    @classmethod
    def from_config(cls, section: Recipe | Mapping[str, Any] | object | None) -> Recipe:
        """Read a recipe from a mapping or an object with these attributes, or None (the defaults).

        The ranges of its values are in ``configs/schema.py``.

        Raises:
            TypeError: there are unknown keys.
        """
        if section is None or isinstance(section, cls):
            return section or cls()
        given = section if isinstance(section, Mapping) else vars(section)
        values = {key: tuple(v) if key in _SEQUENCES else v for key, v in given.items() if key not in OTHER_KEYS}
        return cls(**values)


class CropDraw(NamedTuple):
    """All parameters that determine one crop of an image.

    box: (left, top, width, height) in pixels. jitter: (operation, parameter) pairs in order of application, possibly
    empty; the parameter is a factor, or a shift in turns for "hue". sigma: blur in pixels, or None for no blur.
    """

    box: Box
    flip: bool
    jitter: Jitter
    gray: bool
    sigma: float | None
    solarize: bool


def draw_crop(
    rng: random.Random,
    width: int,
    height: int,
    scale: Sequence[float],
    recipe: Recipe,
    blur_p: float,
    solarize_p: float,
) -> CropDraw:
    """Draw one crop of a ``width`` x ``height`` image; ``scale`` is the range of the crop's area as a fraction."""
    box, flip = draw_box(rng, width, height, scale), rng.random() < recipe.hflip_p
    return draw_colours(rng, box, flip, recipe, blur_p, solarize_p)


def draw_colours(
    rng: random.Random, box: Box, flip: bool, recipe: Recipe, blur_p: float, solarize_p: float
) -> CropDraw:
    """Draw the colour changes of a crop whose box and flip are given."""
    return CropDraw(
        box=box,
        flip=flip,
        jitter=draw_jitter(rng, recipe) if rng.random() < recipe.jitter_p else (),
        gray=rng.random() < recipe.gray_p,
        sigma=rng.uniform(*recipe.blur_sigma) if rng.random() < blur_p else None,
        solarize=rng.random() < solarize_p,
    )


def draw_box(
    rng: random.Random,
    width: int,
    height: int,
    scale: Sequence[float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    tries: int = 10,
) -> Box:
    """Draw (left, top, width, height): area uniform in ``scale``, aspect log-uniform in ``ratio``, position uniform.

    A box that does not fit is redrawn; after ``tries`` attempts, return the largest centred box with an allowed aspect.

    Source: torchvision's RandomResizedCrop.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(tries):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (width - w) // 2, (height - h) // 2, w, h


def draw_jitter(rng: random.Random, recipe: Recipe) -> Jitter:
    """Draw the four colour changes in random order, each uniform in its range; an operation of strength 0 is omitted.

    Source: torchvision's ColorJitter.
    """
    strengths = (("brightness", recipe.brightness), ("contrast", recipe.contrast), ("saturation", recipe.saturation))
    steps = [(name, rng.uniform(max(0.0, 1 - s), 1 + s)) for name, s in strengths if s > 0]
    if recipe.hue > 0:
        steps.append(("hue", rng.uniform(-recipe.hue, recipe.hue)))
    rng.shuffle(steps)
    return tuple(steps)
