"""Image transforms with upstream's names: normalisation, GaussianBlur and the classification pipelines of evaluation.

These take PIL images and follow torchvision on PIL, resize included, because evaluation must give upstream's pixels.
Random ones take ``rng``, a ``random.Random`` (None: seeded by the operating system).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dinov2_custom.errors import class_of_torchvision

from .draws import draw_box
from .pixels import gaussian_blur

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)


class RandomTransform:
    """A transform that takes ``rng``; :class:`Compose` passes its own generator to it."""


class Compose(RandomTransform, class_of_torchvision("transforms", "Compose", otherwise=object)):
    """Apply ``transforms`` in turn; random ones share one generator per call."""

    def __init__(self, transforms: Sequence[Callable]):
        self.transforms = list(transforms)

    def __call__(self, image: Any, rng: random.Random | None = None) -> Any:
        if rng is None and any(isinstance(transform, RandomTransform) for transform in self.transforms):
            rng = random.Random()
        for transform in self.transforms:
            image = transform(image, rng) if isinstance(transform, RandomTransform) else transform(image)
        return image


class GaussianBlur(RandomTransform, class_of_torchvision("transforms", "RandomApply", otherwise=nn.Module)):
    """Blur a PIL image (9 x 9) with sigma uniform in ``radius_min``..``radius_max``, with probability **1 - p**.

    The inversion is upstream's, and its released models were trained with it; ``augmentation.blur_p`` holds the
    probabilities actually applied.

    Source: upstream data/transforms.py.
    """

    def __init__(self, *, p: float = 0.5, radius_min: float = 0.1, radius_max: float = 2.0):
        nn.Module.__init__(self)
        self.p = 1 - p
        self.radius_min = radius_min
        self.radius_max = radius_max

    def forward(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        rng = rng or random.Random()
        if rng.random() >= self.p:
            return image
        sigma = rng.uniform(self.radius_min, self.radius_max)
        planes = np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        blurred = gaussian_blur(planes, sigma)
        return Image.fromarray(np.ascontiguousarray(blurred.transpose(1, 2, 0)))


class MaybeToTensor(class_of_torchvision("transforms", "ToTensor", otherwise=object)):
    """Convert a PIL image or uint8 array (H, W[, C]) to float32 (C, H, W) in 0..1; return a tensor unchanged."""

    def __call__(self, image: Any) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            return image
        pixels = np.array(image)
        if pixels.dtype != np.uint8:
            raise TypeError(f"expected 8-bit pixels, got {pixels.dtype}; decode with dinov2_custom.data.decode")
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)


class Normalize(class_of_torchvision("transforms", "Normalize", otherwise=nn.Module)):
    """Subtract ``mean`` and divide by ``std`` per channel, for float (..., C, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        nn.Module.__init__(self)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.inplace = False

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(v, dtype=tensor.dtype, device=tensor.device) for v in (self.mean, self.std))
        return (tensor - mean[:, None, None]) / std[:, None, None]


class Resize:
    """Resize a PIL image so that its shorter side has ``size`` pixels."""

    def __init__(self, size: int, interpolation: Any = "bicubic"):
        self.size = size
        self.resampling = as_resampling(interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width <= height:
            target = (self.size, int(self.size * height / width))
        else:
            target = (int(self.size * width / height), self.size)
        return image if target == image.size else image.resize(target, self.resampling)


class CenterCrop:
    """Crop the central ``size`` x ``size`` pixels of a PIL image, padding smaller images with black."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        short_x, short_y = (max(self.size - side, 0) for side in image.size)
        if short_x or short_y:
            canvas = Image.new(image.mode, (image.width + short_x, image.height + short_y))
            canvas.paste(image, (short_x // 2, short_y // 2))
            image = canvas
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomResizedCrop(RandomTransform):
    """Crop a random box (8..100 % of the area, aspect 3/4..4/3) of a PIL image and resize it to ``size``."""

    def __init__(self, size: int, interpolation: Any = "bicubic", scale: tuple[float, float] = (0.08, 1.0)):
        self.size = size
        self.scale = scale
        self.resampling = as_resampling(interpolation)

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        left, top, width, height = draw_box(rng or random.Random(), *image.size, self.scale)
        crop = image.crop((left, top, left + width, top + height))
        return crop.resize((self.size, self.size), self.resampling)


class RandomHorizontalFlip(RandomTransform):
    """Flip a PIL image horizontally with probability ``p``."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        flip = (rng or random.Random()).random() < self.p
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def as_resampling(interpolation: Any) -> Image.Resampling:
    """Return Pillow's constant for a name ("bicubic"), a Pillow constant, or an enum whose value is such a name."""
    if isinstance(interpolation, Image.Resampling):
        return interpolation
    name = str(getattr(interpolation, "value", interpolation)).upper()
    if name not in Image.Resampling.__members__:
        known = ", ".join(member.lower() for member in Image.Resampling.__members__)
        raise ValueError(f"interpolation: expected one of {known}, got {interpolation!r}")
    return Image.Resampling[name]


def make_normalize_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> Normalize:
    """Return a callable that normalises float tensors in 0..1."""
    return Normalize(mean=mean, std=std)


def make_classification_train_transform(
    *,
    crop_size: int = 224,
    interpolation: Any = "bicubic",
    hflip_prob: float = 0.5,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Compose:
    """Return the transform for training a classifier: random resized crop, flip, normalise (PIL -> float tensor)."""
    steps: list[Callable] = [RandomResizedCrop(crop_size, interpolation)]
    if hflip_prob > 0:
        steps.append(RandomHorizontalFlip(hflip_prob))
    return Compose([*steps, MaybeToTensor(), make_normalize_transform(mean, std)])


def resize_side(image_size: int) -> int:
    """Return the shorter side before the central crop of ``image_size``, in the ratio of 256 to 224."""
    return round(image_size * 256 / 224)


def make_central_crop_transform(image_size: int, mean: Sequence[float], std: Sequence[float]) -> Compose:
    """Return :func:`make_classification_eval_transform` for a central crop of ``image_size`` pixels."""
    sizes = {"resize_size": resize_side(image_size), "crop_size": image_size}
    return make_classification_eval_transform(**sizes, mean=mean, std=std)


def make_classification_eval_transform(
    *,
    resize_size: int = 256,
    interpolation: Any = "bicubic",
    crop_size: int = 224,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Compose:
    """Return the transform for evaluation: resize the shorter side, centre crop, normalise (PIL -> float tensor)."""
    steps = [Resize(resize_size, interpolation), CenterCrop(crop_size), MaybeToTensor()]
    return Compose([*steps, make_normalize_transform(mean, std)])
