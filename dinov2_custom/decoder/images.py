"""Images and targets of a decoder: read, augment, resize to a square, normalise, and stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinov2_custom.data.decode import decode_rgb
from dinov2_custom.data.transforms import MaybeToTensor, Normalize
from dinov2_custom.decoder.bridge import Facts
from dinov2_custom.decoder.instances import IGNORE, LabelledImage, Split, instance_mask, semantic_mask
from dinov2_custom.decoder.settings import Settings
from dinov2_custom.utils.rng import random_for

_LEAST_VISIBLE = 0.25  # share of a box that must stay in a zoomed image


class View(NamedTuple):
    """The part of an image that is used: left, top, width, height in pixels, possibly beyond its borders."""

    left: int
    top: int
    width: int
    height: int
    flipped: bool = False


class Images(Dataset):
    """The images of ``split`` as ``{"pixel_values": (C, S, S), "labels": ...}``; augmented if ``settings`` are given.

    The augmentation depends on the seed, the epoch and the number of the image alone, so that a resumed run draws the
    same one.
    """

    def __init__(self, split: Split, facts: Facts, settings: Settings | None = None) -> None:
        self.split, self.facts, self.settings, self.epoch = split, facts, settings, 0

    def __len__(self) -> int:
        return len(self.split.images)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the augmentation, before a data loader is iterated over."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.split.images[index]
        pixels = read_image(image.path, self.facts)
        view = self._view(index, *pixels.size)
        target = {
            "detection": boxes_in,
            "instance": masks_in,
            "semantic": classes_in,
        }[self.facts.task](image, view, pixels.size, self.facts)
        return {"pixel_values": to_input(pixels, self.facts, view), "labels": target}

    def _view(self, index: int, width: int, height: int) -> View:
        if self.settings is None:
            return View(0, 0, width, height)
        generator = random_for(self.settings.seed, "decoder view", self.epoch, index)
        zoom = 1 + self.settings.scale_jitter * generator.uniform(-1, 1)
        side = [max(1, round(zoom * length)) for length in (width, height)]
        left, top = (round(generator.uniform(0, full - own)) for full, own in zip((width, height), side, strict=True))
        return View(left, top, *side, generator.random() < self.settings.flip)


def read_image(path: Any, facts: Facts) -> Image.Image:
    """Return the image in RGB, read as in pretraining."""
    return decode_rgb(path.read_bytes(), str(path), reading=facts.reading)


def to_input(image: Image.Image, facts: Facts, view: View | None = None) -> Tensor:
    """Return the model's input (C, S, S) of a view of an image, or of all of it."""
    cut = _cut(image, view or View(0, 0, *image.size), 0, facts.image_size)
    return Normalize(**facts.normalize)(MaybeToTensor()(cut))


def _cut(image: Image.Image, view: View, fill: int, size: int, resample: int = Image.Resampling.BICUBIC) -> Image.Image:
    if (view.left, view.top, view.width, view.height) != (0, 0, *image.size):
        part = Image.new(image.mode, (view.width, view.height), fill if image.mode == "L" else (fill,) * 3)
        part.paste(image, (-view.left, -view.top))
        image = part
    image = image.resize((size, size), resample)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flipped else image


def _visible(image: LabelledImage, view: View) -> list[tuple[int, tuple[float, float, float, float]]]:
    """Return (number of the instance, its box in the view as centre x, centre y, width, height in 0..1)."""
    found = []
    for number, one in enumerate(image.instances):
        x, y, width, height = one.box
        left, right = ((min(max(e - view.left, 0), view.width)) / view.width for e in (x, x + width))
        top, bottom = ((min(max(e - view.top, 0), view.height)) / view.height for e in (y, y + height))
        seen = (right - left) * view.width * (bottom - top) * view.height
        if one.crowd or seen <= 0 or seen < _LEAST_VISIBLE * width * height:
            continue
        left, right = (1 - right, 1 - left) if view.flipped else (left, right)
        found.append((number, ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)))
    return found


def boxes_in(image: LabelledImage, view: View, size: tuple[int, int], facts: Facts) -> dict[str, Tensor]:
    """Return ``class_labels`` (N,) and ``boxes`` (N, 4) as centre and size in 0..1; crowds are left out."""
    found = _visible(image, view)
    labels = [image.instances[number].category for number, _ in found]
    return {
        "class_labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.tensor([box for _, box in found], dtype=torch.float32).reshape(-1, 4),
    }


def masks_in(image: LabelledImage, view: View, size: tuple[int, int], facts: Facts) -> dict[str, Tensor]:
    """Return :func:`boxes_in` and ``masks`` (N, S, S)."""
    masks = [
        _resized_mask(instance_mask(image.instances[number], size[1], size[0]), view, facts.image_size)
        for number, _ in _visible(image, view)
    ]
    empty = torch.zeros(0, facts.image_size, facts.image_size)
    return boxes_in(image, view, size, facts) | {"masks": torch.stack(masks) if masks else empty}


def _resized_mask(mask: np.ndarray, view: View, size: int) -> Tensor:
    cut = _cut(Image.fromarray(mask.astype(np.uint8)), view, 0, size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(cut, dtype=np.float32))


def classes_in(image: LabelledImage, view: View, size: tuple[int, int], facts: Facts) -> Tensor:
    """Return the class of each pixel (S, S), ``IGNORE`` where there is none."""
    mask = Image.fromarray(semantic_mask(image, len(facts.classes)))
    cut = _cut(mask, view, IGNORE, facts.image_size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(cut, dtype=np.int64))


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack images, and targets of semantic segmentation; other targets stay a list."""
    labels = [sample["labels"] for sample in samples]
    stacked = torch.stack(labels) if isinstance(labels[0], Tensor) else labels
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "labels": stacked}
