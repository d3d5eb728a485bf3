"""DINOv2's multi-crop augmentation: two global and several local crops per image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import pixels as ops
from .draws import Box, CropDraw, Recipe, draw_box, draw_colours, draw_crop
from .pixels import change_colours, cut_crops
from .transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    GaussianBlur,
    RandomTransform,
    make_normalize_transform,
)

__all__ = ["DataAugmentationDINO", "GaussianBlur", "make_normalize_transform"]

SHRINK_MARGIN = 1.5
STEPS = ("geometric_augmentation_global", "geometric_augmentation_local")
STEPS += ("global_transfo1", "global_transfo2", "local_transfo", "normalize")


class DataAugmentationDINO:
    """Cut an image into the crops of DINOv2.

    Each crop is a random resized crop (bicubic), randomly flipped, then randomly colour-jittered, converted to grey and
    blurred, and finally normalised; global crop 2 may also be solarized. ``augmentation`` holds the strengths (a
    mapping or object with :class:`Recipe`'s fields; None uses upstream's). ``*_crops_scale`` is a (low, high) fraction
    of the image area; sizes are in pixels.

    Source: upstream data/augmentations.py. ``augmentation.blur_p`` holds the probabilities actually applied, whereas
    upstream's GaussianBlur inverts its argument.
    """

    def __init__(
        self,
        global_crops_scale: Sequence[float],
        local_crops_scale: Sequence[float],
        local_crops_number: int,
        global_crops_size: int = 224,
        local_crops_size: int = 96,
        *,
        augmentation: Any = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        self.global_crops_scale = tuple(global_crops_scale)
        self.local_crops_scale = tuple(local_crops_scale)
        self.local_crops_number = local_crops_number
        self.global_crops_size = global_crops_size
        self.local_crops_size = local_crops_size
        self.recipe = Recipe.from_config(augmentation)
        self.mean = np.asarray(mean, np.float64)
        self.std = np.asarray(std, np.float64)

    def __call__(self, image: Image.Image | np.ndarray, rng: random.Random | None = None) -> dict[str, Any]:
        """Return the crops of ``image`` (PIL, or uint8 (H, W, 3)) as normalised float32 (3, size, size) tensors.

        Keys: ``global_crops`` (two), ``global_crops_teacher`` (the same objects), ``local_crops``
        (``local_crops_number``), ``offsets`` (empty). All random numbers come from ``rng``; None uses a new generator
        seeded by the operating system.
        """
        rng = rng or random.Random()
        if self._is_changed():
            return self._compose(image, rng)
        pixels = as_pixels(image)
        draws = self.draw(pixels.shape[1], pixels.shape[0], rng)
        resized = [np.empty((size, size, 3), np.uint8) for size in self.sizes]
        cut_crops(resized, pixels, draws)
        planes = (np.ascontiguousarray(crop.transpose(2, 0, 1)) for crop in resized)
        changed = (change_colours(crop, draw) for crop, draw in zip(planes, draws, strict=True))
        return _as_sample([ops.normalize(crop, self.mean, self.std) for crop in changed])

    # The steps of a crop under upstream's names. They can be called individually, and replaced on an instance or in a
    # subclass: if any of them is replaced, :meth:`__call__` runs all steps through these methods.

    def geometric_augmentation_global(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        """Return a random global crop, possibly flipped, as a PIL image with unchanged colours."""
        return self._cut(image, rng, self.global_crops_size, self.global_crops_scale)

    def geometric_augmentation_local(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        """Return a random local crop, possibly flipped, as a PIL image with unchanged colours."""
        return self._cut(image, rng, self.local_crops_size, self.local_crops_scale)

    def global_transfo1(self, image: Image.Image, rng: random.Random | None = None) -> torch.Tensor:
        """Change the colours of the first global crop and normalise it."""
        return self._change(image, rng, self.recipe.blur_p[0], 0.0)

    def global_transfo2(self, image: Image.Image, rng: random.Random | None = None) -> torch.Tensor:
        """Change the colours of the second global crop and normalise it."""
        return self._change(image, rng, self.recipe.blur_p[1], self.recipe.solarize_p)

    def local_transfo(self, image: Image.Image, rng: random.Random | None = None) -> torch.Tensor:
        """Change the colours of a local crop and normalise it."""
        return self._change(image, rng, self.recipe.blur_p[2], 0.0)

    def normalize(self, image: Image.Image) -> torch.Tensor:
        """Return a PIL image as normalised float32 (3, H, W)."""
        return ops.normalize(as_pixels(image).numpy().transpose(2, 0, 1), self.mean, self.std)

    def _cut(self, image: Image.Image, rng: random.Random | None, size: int, scale: Sequence[float]) -> Image.Image:
        rng, pixels = rng or random.Random(), as_pixels(image)
        box = draw_box(rng, pixels.shape[1], pixels.shape[0], scale)
        crop = np.empty((size, size, 3), np.uint8)
        flip = rng.random() < self.recipe.hflip_p
        cut_crops([crop], pixels, [CropDraw(box, flip, jitter=(), gray=False, sigma=None, solarize=False)])
        return Image.fromarray(crop)

    def _change(self, image: Image.Image, rng: random.Random | None, blur_p: float, solarize_p: float) -> torch.Tensor:
        planes = np.ascontiguousarray(as_pixels(image).numpy().transpose(2, 0, 1))
        draw = draw_colours(rng or random.Random(), (0, 0, *image.size), False, self.recipe, blur_p, solarize_p)
        changed = np.broadcast_to(change_colours(planes, draw), planes.shape)
        return self.normalize(Image.fromarray(np.ascontiguousarray(changed.transpose(1, 2, 0))))

    def _is_changed(self) -> bool:
        return not all(self._is_own(name) for name in STEPS)

    def _is_own(self, name: str) -> bool:
        return getattr(getattr(self, name), "__func__", None) is vars(DataAugmentationDINO)[name]

    def _compose(self, image: Image.Image, rng: random.Random) -> dict[str, Any]:
        def apply(name: str, image: Any) -> Any:
            step = getattr(self, name)
            return step(image, rng) if self._is_own(name) or isinstance(step, RandomTransform) else step(image)

        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        of_crops = [("geometric_augmentation_global", f"global_transfo{i}") for i in (1, 2)]
        of_crops += [("geometric_augmentation_local", "local_transfo")] * self.local_crops_number
        return _as_sample([apply(colours, apply(geometric, image)) for geometric, colours in of_crops])

    @property
    def sizes(self) -> list[int]:
        """Side length of each crop in pixels: global 1, global 2, locals."""
        return [self.global_crops_size] * 2 + [self.local_crops_size] * self.local_crops_number

    def draw(self, width: int, height: int, rng: random.Random) -> list[CropDraw]:
        """Draw the parameters of all crops (global 1, global 2, locals) of a ``width`` x ``height`` image."""
        recipe, (blur_1, blur_2, blur_local) = self.recipe, self.recipe.blur_p
        draws = [
            draw_crop(rng, width, height, self.global_crops_scale, recipe, blur_1, 0.0),
            draw_crop(rng, width, height, self.global_crops_scale, recipe, blur_2, recipe.solarize_p),
        ]
        for _ in range(self.local_crops_number):
            draws.append(draw_crop(rng, width, height, self.local_crops_scale, recipe, blur_local, 0.0))
        return draws

    def fraction(self, draws: Sequence[CropDraw]) -> int:
        """Return the largest decoding denominator (1, 2, 4 or 8) that leaves enough pixels for every crop.

        After decoding at that fraction of its size, the image still has ``SHRINK_MARGIN`` times the pixels that each
        crop needs along its shorter side.
        """
        need = min(min(draw.box[2:]) / size for draw, size in zip(draws, self.sizes, strict=True))
        return next((s for s in (8, 4, 2) if need >= SHRINK_MARGIN * s), 1)


def _as_sample(crops: list[Any]) -> dict[str, Any]:
    """Return the dict of :meth:`DataAugmentationDINO.__call__` for ``crops`` (global 1, global 2, locals)."""
    return {"global_crops": crops[:2], "global_crops_teacher": crops[:2], "local_crops": crops[2:], "offsets": ()}


def shrink_box(box: Box, size: tuple[int, int], shrunk: tuple[int, int]) -> Box:
    """Scale ``box`` from an image of ``size`` (width, height) to the same image resized to ``shrunk``."""
    found = []
    for start, length, full, less in zip(box[:2], box[2:], size, shrunk, strict=True):
        kept = max(1, round(length * less / full))
        found.append((min(round(start * less / full), less - kept), kept))
    (left, width), (top, height) = found
    return left, top, width, height


def as_pixels(image: Image.Image | np.ndarray) -> torch.Tensor:
    """Return uint8 (H, W, 3), a copy for a PIL image."""
    if isinstance(image, Image.Image):
        image = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(image)

