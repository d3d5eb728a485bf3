"""Slow references for the pixel operations: Pillow's own operations, as applied by torchvision to PIL images."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from dinov2_custom.data.draws import CropDraw


def resized_crop(image: Image.Image, box, size: int, flip: bool = False) -> Image.Image:
    left, top, width, height = box
    crop = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.mirror(crop) if flip else crop


def brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def saturation(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(factor)


def hue(image: Image.Image, shift: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    turned = (np.asarray(h).astype(int) + int(shift * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8)), s, v)).convert("RGB")


def grayscale(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def solarize(image: Image.Image) -> Image.Image:
    return ImageOps.solarize(image, threshold=128)


def gaussian_blur(image: Image.Image, sigma: float) -> Image.Image:
    """Convolve with the full 9 x 9 kernel in float64, reflecting at the border, and round."""
    line = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel = np.outer(line, line) / line.sum() ** 2
    padded = np.pad(np.asarray(image).astype(np.float64), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (9, 9), axis=(0, 1))
    return Image.fromarray(np.round(np.einsum("hwcij,ij->hwc", windows, kernel)).astype(np.uint8))


JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}


def render(image: Image.Image, draw: CropDraw, size: int) -> Image.Image:
    """Apply all operations of a draw with the slow references."""
    crop = resized_crop(image, draw.box, size, draw.flip)
    for name, parameter in draw.jitter:
        crop = JITTER[name](crop, parameter)
    crop = grayscale(crop) if draw.gray else crop
    crop = gaussian_blur(crop, draw.sigma) if draw.sigma is not None else crop
    return solarize(crop) if draw.solarize else crop


def normalize(image: Image.Image, mean, std) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    return ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).float()
