"""Pixel operations of the augmentation, from uint8 to uint8, with all parameters given by the caller.

Each colour change matches Pillow (through torchvision), using a few whole-array integer operations of numpy. If OpenCV
is installed (extra ``fast``), :func:`change_colours_into` uses it for the same levels in about half the time.
Crops are resized by torch or Pillow. Unless said otherwise, arrays are planar, C-contiguous ``(C, H, W)`` uint8 with C
= 3, or 1 after :func:`grayscale`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import multiprocessing
import random
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from .draws import CropDraw, Recipe, draw_jitter

logger = logging.getLogger("dinov2")
BLUR_RADIUS = 4
SOLARIZE_THRESHOLD = 128


def cut_crops(
    outs: Sequence[np.ndarray], image: np.ndarray | torch.Tensor, draws: Sequence[CropDraw], kernel: str | None = None
) -> None:
    """Cut the box of each of ``draws`` from ``image`` (H, W, 3), resize it into its ``out`` (S, S, 3), and flip it.

    Colours are not changed. Bicubic with antialiasing; pixels outside the box do not contribute. ``outs`` are
    contiguous. ``kernel``: one of ``KERNELS``, by default :func:`resize_kernel`'s.
    """
    if isinstance(image, torch.Tensor):
        image = image.numpy()
    if image.strides[1:] != (3, 1):
        image = np.ascontiguousarray(image)
    resize = KERNELS[kernel or resize_kernel()]
    for out, draw in zip(outs, draws, strict=True):
        left, top, width, height = draw.box
        resize(out, image[top : top + height, left : left + width], draw.flip)


def _resize_by_torch(out: np.ndarray, crop: np.ndarray, flip: bool) -> None:
    # copying the crop and adding the axis is cheaper in numpy than in torch
    source, target = (torch.from_numpy(a[None]).permute(0, 3, 1, 2) for a in (np.ascontiguousarray(crop), out))
    torch.ops.aten._upsample_bicubic2d_aa.out(source, out.shape[:2], False, None, None, out=target)
    if flip and (cv2 := opencv()):
        cv2.flip(out, 1, dst=out)  # takes a quarter of torch's time
    elif flip:
        target.copy_(target.flip(3))


def _resize_by_pillow(out: np.ndarray, crop: np.ndarray, flip: bool) -> None:
    resized = np.asarray(Image.fromarray(crop).resize(out.shape[:2], Image.Resampling.BICUBIC))
    out[...] = resized[:, ::-1] if flip else resized


KERNELS = {"torch": _resize_by_torch, "Pillow": _resize_by_pillow}


def resize_kernel() -> str:
    """Return which of ``KERNELS`` resizes crops on this machine; their pixels differ by a few hundredths of a level.

    Torch's kernel is several times faster if it is vectorised, which is the case on x86, and half as fast otherwise.
    """
    return "torch" if torch.backends.cpu.get_cpu_capability().startswith("AVX") else "Pillow"


def blend(base: np.ndarray | int, image: np.ndarray, factor: float) -> np.ndarray:
    """Return ``base + factor * (image - base)``, clipped to 0..255 and rounded down, as ``Image.blend`` does.

    ``base`` is a level or a plane of levels (uint8); ``factor`` >= 0, 1 changes nothing. The factor is rounded to the
    finest step that 16 bits hold (below 1/256 for factors up to 1.5); factors above 128 are clamped to 128.
    """
    gain, shift = blend_gain(factor)
    levels = image.astype(np.int16)
    change = levels - (np.int16(base) if isinstance(base, int) else base.astype(np.int16))
    change *= np.int16(gain)
    change >>= np.int16(shift)
    change += levels
    if factor > 1:
        np.clip(change, 0, 255, out=change)
    return change.astype(np.uint8)


def blend_gain(factor: float) -> tuple[int, int]:
    """Return (gain, shift) such that ``gain / 2**shift`` is ``factor - 1``, rounded as finely as gain <= 128 allows."""
    gain = min(factor - 1.0, 127.0)
    mantissa, exponent = math.frexp(abs(gain))
    shift = min(15, max(0, 7 - exponent + (mantissa == 0.5)))
    return round(gain * (1 << shift)), shift


def luma(image: np.ndarray) -> np.ndarray:
    """Return the (H, W) uint8 grey level .299 R + .587 G + .114 B (ITU-R 601), rounded."""
    if image.shape[0] == 1:
        return image[0]
    total = np.full(image.shape[1:], 128, np.uint16)
    for plane, weight in zip(image, (77, 150, 29), strict=True):
        total += plane.astype(np.uint16) * np.uint16(weight)
    total >>= np.uint16(8)
    return total.astype(np.uint8)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply by ``factor`` (0: black, 1: unchanged)."""
    return blend(0, image, factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Move every level away from (``factor`` > 1) or towards the image's mean grey level, itself rounded."""
    grey = luma(image)
    total = int(grey.sum(dtype=np.uint32 if grey.size < 1 << 24 else np.uint64))
    return blend(int(total / grey.size + 0.5), image, factor)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Move every pixel away from (``factor`` > 1) or towards its own grey level."""
    return blend(luma(image), image, factor)


def grayscale(image: np.ndarray) -> np.ndarray:
    """Return the grey level as one plane (1, H, W); :func:`normalize` repeats it in three."""
    return luma(image)[None]


def solarize(image: np.ndarray, threshold: int = SOLARIZE_THRESHOLD) -> np.ndarray:
    """Invert the levels at or above ``threshold``."""
    return np.minimum(image, 255 - image) if threshold == 128 else np.where(image < threshold, image, 255 - image)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Rotate the hue by ``shift`` turns (-0.5..0.5), keeping value and chroma.

    Pillow converts to 8-bit HSV, adds to H, and converts back. Here the same rotation needs no division: a pixel's hue
    moves along the edges of the RGB hexagon, by ``chroma * shift`` for its middle channel. The shift is rounded to
    1/255 turn as in Pillow, less half a step because H is rounded down.
    """
    sextants = hue_sextants(shift)
    if sextants == 0:
        return image
    passes = int(np.ceil(abs(sextants) / 0.5))
    x = image.astype(np.int16)
    high = np.maximum(np.maximum(x[0], x[1]), x[2])
    low = np.minimum(np.minimum(x[0], x[1]), x[2])
    total = np.rint((high - low) * np.float32(abs(sextants))).astype(np.int16)
    for i in range(passes):
        move = total if passes == 1 else total * (i + 1) // passes - total * i // passes
        x = _turn(x, high, low, move, forward=sextants > 0)
    return x.astype(np.uint8)


def hue_sextants(shift: float) -> float:
    """Return the rotation that :func:`adjust_hue` applies for ``shift``, in sixths of a turn; 0 for none."""
    steps = int(shift * 255)
    return 6 * (steps - 0.5) / 255 if steps else 0.0


def _turn(x: np.ndarray, high: np.ndarray, low: np.ndarray, move: np.ndarray, forward: bool) -> np.ndarray:
    """Move the hue of ``x`` by ``move`` <= half the chroma (rounded up) along the hexagon, red to green if ``forward``.

    Let ``ahead`` be the channel after c in the direction of rotation (R, G, B, R, ... forward). Channel c rises where
    the channel behind it is the largest, once ``ahead`` has fallen to the lowest level, and falls where ``ahead`` has
    reached the highest. With such a ``move`` both cannot happen at once, so clipping suffices.
    """
    ahead = x[[1, 2, 0]] if forward else x[[2, 0, 1]]
    risen = np.subtract(low + move, ahead)
    risen += x
    np.maximum(risen, x, out=risen)
    np.minimum(risen, high, out=risen)
    fallen = np.subtract(risen, ahead)
    fallen += high - move
    np.minimum(fallen, risen, out=fallen)
    return np.maximum(fallen, low, out=fallen)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a 9 x 9 Gaussian of ``sigma`` pixels, reflected at the border without repeating the edge.

    Two passes of 16-bit integers run over the padded image viewed as one flat row, so that a shift is a slice. Weights
    are rounded to 1/256; the mean difference from a float convolution is below a tenth of a level.
    """
    weights = blur_weights(sigma)
    radius = len(weights) - 1
    if radius == 0:
        return image
    padded = _pad_reflect(image, radius)
    planes, height, width = padded.shape
    flat = padded.reshape(-1)
    for step in (width, 1):
        flat = _convolve_flat(flat, weights, step)
    rows = np.lib.stride_tricks.as_strided(
        flat, (planes, height - 2 * radius, width - 2 * radius), (height * width * 2, width * 2, 2), writeable=False
    )
    return rows.astype(np.uint8)


@functools.lru_cache(maxsize=1024)
def blur_weights(sigma: float) -> tuple[int, ...]:
    """Return the weights of the centre and of the taps at distance 1, 2, ... (symmetric), integers that sum to 256."""
    kernel = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(1, BLUR_RADIUS + 1)]
    scale = 256 / (1 + 2 * sum(kernel))
    taps = [weight for weight in (round(scale * one) for one in kernel) if weight]
    return (256 - 2 * sum(taps), *taps)


def _convolve_flat(flat: np.ndarray, weights: tuple[int, ...], step: int) -> np.ndarray:
    """Convolve a flat uint16 row with symmetric taps ``step`` apart; the result is ``2 * radius * step`` shorter."""
    radius = len(weights) - 1
    size = flat.size - 2 * radius * step
    centre = radius * step
    total = flat[centre : centre + size] * np.uint16(weights[0])
    total += np.uint16(128)
    pair = np.empty_like(total)
    for distance in range(1, radius + 1):
        before, after = centre - distance * step, centre + distance * step
        np.add(flat[before : before + size], flat[after : after + size], out=pair)
        pair *= np.uint16(weights[distance])
        total += pair
    total >>= np.uint16(8)
    return total


def _pad_reflect(image: np.ndarray, radius: int) -> np.ndarray:
    planes, height, width = image.shape
    if min(height, width) <= radius:
        return np.pad(image, ((0, 0), (radius, radius), (radius, radius)), mode="reflect").astype(np.uint16)
    out = np.empty((planes, height + 2 * radius, width + 2 * radius), np.uint16)
    out[:, radius:-radius, radius:-radius] = image
    out[:, radius:-radius, :radius] = image[:, :, radius:0:-1]
    out[:, radius:-radius, -radius:] = image[:, :, -2 : -2 - radius : -1]
    out[:, :radius] = out[:, 2 * radius : radius : -1]
    out[:, -radius:] = out[:, -radius - 2 : -2 * radius - 2 : -1]
    return out


def normalize(image: np.ndarray, mean: np.ndarray, std: np.ndarray) -> torch.Tensor:
    """Return float32 (3, H, W): levels / 255, minus ``mean``, over ``std`` (each of shape (3,)); grey is repeated."""
    out = torch.empty((3, *image.shape[1:]), dtype=torch.float32)
    pixels = out.numpy()
    np.copyto(pixels, image)
    pixels *= (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)[:, None, None]
    pixels -= (np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32)[:, None, None]
    return out


COLOUR_CHANGES = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def change_colours(crop: np.ndarray, draw: CropDraw) -> np.ndarray:
    """Apply the colour changes of ``draw`` to (3, S, S); a grey result is (1, S, S)."""
    for name, parameter in draw.jitter:
        crop = COLOUR_CHANGES[name](crop, parameter)
    if draw.gray:
        crop = grayscale(crop)
    if draw.sigma is not None:
        crop = gaussian_blur(crop, draw.sigma)
    return solarize(crop) if draw.solarize else crop


def change_colours_into(out: np.ndarray, crop: np.ndarray, draw: CropDraw) -> None:
    """Write ``change_colours(crop)`` to ``out``, (3, S, S); ``crop`` is (S, S, 3) and is overwritten."""
    cv2 = opencv()
    if cv2 is None:
        out[...] = change_colours(np.ascontiguousarray(crop.transpose(2, 0, 1)), draw)
    else:
        _change_by_opencv(cv2, out, crop, draw)


@functools.cache
def opencv() -> ModuleType | None:
    """Return cv2, or None if it is not installed or its levels differ from the numpy code on this machine.

    The comparison runs once per process, over a few dozen draws, so that a run resumed without OpenCV, or with another
    version, has the same pixels.
    """
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError:
        return None
    if multiprocessing.parent_process() is not None:  # a data-loading process has one core
        cv2.setNumThreads(0)
    rng, numbers = random.Random(0), np.random.default_rng(0)
    recipe = Recipe(hue=0.5, brightness=0.8, contrast=0.8, saturation=0.8)
    for i in range(32):
        size = (4, 11, 37, 80)[i % 4]
        crop = numbers.integers(0, 256, (size, size, 3), dtype=np.uint8)
        sigma = rng.uniform(0.1, 2.0) if i % 3 else None
        draw = CropDraw((0, 0, 1, 1), False, draw_jitter(rng, recipe), i % 5 == 0, sigma, i % 2 == 0)
        expected, out = change_colours(np.ascontiguousarray(crop.transpose(2, 0, 1)), draw), np.empty_like(crop)
        _change_by_opencv(cv2, out.reshape(3, size, size), crop, draw)
        if (out.reshape(3, size, size) != expected).any():
            logger.warning(f"colours are changed by numpy: OpenCV {cv2.__version__} has other levels on this machine")
            return None
    return cv2


# Rows of a matrix from R, G, B, 1 to the grey level of luma(); the last number makes halves round up.
ONE = np.ones(1, np.float32)
LUMA = np.tile(np.float32([77, 150, 29, 0.25]) / 256, (3, 1))


def _change_by_opencv(cv2: ModuleType, out: np.ndarray, x: np.ndarray, draw: CropDraw) -> None:
    """Implement :func:`change_colours_into` with OpenCV; ``x`` is the crop.

    OpenCV rounds to the nearest level. All sums here are exact in float32, so to round down, 1/2 minus half of the last
    bit is subtracted first.
    """
    grey = np.empty_like(x)
    for name, value in draw.jitter:
        if name == "hue":
            _turn_hue(cv2, x, value, list(grey.reshape(3, *x.shape[:2])))
            continue
        gain, shift = blend_gain(value)
        change, lower = gain / (1 << shift), 0.5 ** (shift + 1) - 0.5
        if name == "brightness":
            cv2.addWeighted(x, 1 + change, x, 0, lower, dst=x)
            continue
        cv2.transform(x, LUMA, dst=grey)
        if name == "saturation":
            cv2.addWeighted(x, 1 + change, grey, -change, lower, dst=x)
        else:
            mean = int(cv2.sumElems(grey)[0] / (len(x) * len(x)) + 0.5)
            cv2.addWeighted(x, 1 + change, x, 0, lower - change * mean, dst=x)
    if draw.gray:
        cv2.transform(x, LUMA, dst=grey)
        x = cv2.extractChannel(grey, 0)
    if draw.sigma is not None:
        weights = np.float32(blur_weights(draw.sigma)) / 256
        weights = np.concatenate([weights[:0:-1], weights])
        for _ in range(2):  # columns, then rows, each rounded with halves up
            x = cv2.sepFilter2D(x, -1, ONE, weights, delta=1 / 512, borderType=cv2.BORDER_REFLECT_101)
            x = cv2.transpose(x)
    if draw.solarize:
        np.minimum(x, 255 - x, out=x)
    if draw.gray:
        out[...] = x
    else:
        cv2.split(x, mv=list(out))


def _turn_hue(cv2: ModuleType, x: np.ndarray, shift: float, planes: list[np.ndarray]) -> None:
    """Apply :func:`adjust_hue` in place; OpenCV's sums and differences saturate at 0 and 255.

    ``planes``: scratch memory for the three planes of ``x``.
    """
    cv2.split(x, mv=planes)
    sextants = hue_sextants(shift)
    forward = sextants > 0
    if not forward:  # the next plane in the direction of rotation is the following one, cyclically
        planes.reverse()
    high, low = cv2.max(cv2.max(*planes[:2]), planes[2]), cv2.min(cv2.min(*planes[:2]), planes[2])
    chroma = cv2.subtract(high, low)
    for moves in _hue_moves(abs(sextants)):
        move = cv2.LUT(chroma, moves)
        bottom, top = cv2.add(low, move), cv2.subtract(high, move)
        turned = []
        for plane, ahead in zip(planes, planes[1:] + planes[:1], strict=True):
            risen = cv2.min(cv2.add(plane, cv2.subtract(bottom, ahead)), high)
            turned.append(cv2.max(cv2.subtract(risen, cv2.subtract(ahead, top)), low))
        planes = turned
    cv2.merge(planes if forward else planes[::-1], dst=x)


@functools.lru_cache(maxsize=256)
def _hue_moves(sextants: float) -> list[np.ndarray]:
    """Return, for each pass of :func:`adjust_hue`, the move of a pixel by its chroma 0..255."""
    passes = int(np.ceil(sextants / 0.5))
    total = np.rint(np.arange(256, dtype=np.int16) * np.float32(sextants)).astype(np.int16)
    return [(total * (i + 1) // passes - total * i // passes).astype(np.uint8) for i in range(passes)]
