"""Pixel operations of the augmentation: uint8 in, uint8 out, every parameter given by the caller.

Each does what Pillow (through torchvision) does, in a few whole-array integer operations. Not in here: any drawing of
parameters (``draws``) and the recipe (``augmentations``). Arrays are planar, C-contiguous ``(C, H, W)`` uint8 with
C = 3, or 1 after :func:`grayscale`. Read :func:`blend` first.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

BLUR_RADIUS = 4
SOLARIZE_THRESHOLD = 128


def blend(base: np.ndarray | int, image: np.ndarray, factor: float) -> np.ndarray:
    """Return ``base + factor * (image - base)``, clipped to 0..255 and rounded down, as ``Image.blend`` does.

    ``base`` is a level or a plane of levels (uint8); ``factor`` >= 0, 1 changes nothing. The factor is rounded to the
    finest step that 16 bits hold (below 1/256 for factors up to 1.5).
    """
    gain, shift = blend_gain(factor)
    if abs(gain) > 128:
        return _blend_float(base, image, factor)
    levels = image.astype(np.int16)
    change = levels - (np.int16(base) if isinstance(base, int) else base.astype(np.int16))
    change *= np.int16(gain)
    change >>= np.int16(shift)
    change += levels
    if factor > 1:
        np.clip(change, 0, 255, out=change)
    return change.astype(np.uint8)


def blend_gain(factor: float) -> tuple[int, int]:
    """Return (gain, shift): ``gain / 2**shift`` is ``factor - 1``, rounded as finely as |gain| <= 128 lets it be.

    Beyond a factor of 129 the shift is 0 and the gain greater.
    """
    gain = factor - 1.0
    mantissa, exponent = math.frexp(abs(gain))
    shift = min(15, max(0, 7 - exponent + (mantissa == 0.5)))
    return round(gain * (1 << shift)), shift


def _blend_float(base: np.ndarray | int, image: np.ndarray, factor: float) -> np.ndarray:
    start = np.asarray(base, np.float32)
    return np.clip(start + np.float32(factor) * (image - start), 0, 255).astype(np.uint8)


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
    """Return the grey level as one plane (1, H, W); :func:`normalize` spreads it over three."""
    return luma(image)[None]


def solarize(image: np.ndarray, threshold: int = SOLARIZE_THRESHOLD) -> np.ndarray:
    """Invert the levels at or above ``threshold``."""
    return np.minimum(image, 255 - image) if threshold == 128 else np.where(image < threshold, image, 255 - image)


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turn the hue by ``shift`` turns (-0.5..0.5), keeping value and chroma.

    Pillow's way is to HSV in bytes, an addition to H, and back. The same turn is had without any division: a pixel's
    hue moves along the edges of the RGB hexagon, by ``chroma * shift`` for its middle channel. The shift is rounded to
    1/255 turn as Pillow's is, less half a step for the rounding down of H.
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
    """Return the turn that :func:`adjust_hue` makes of ``shift``, in sixths of the circle; 0: none."""
    steps = int(shift * 255)
    return 6 * (steps - 0.5) / 255 if steps else 0.0


def _turn(x: np.ndarray, high: np.ndarray, low: np.ndarray, move: np.ndarray, forward: bool) -> np.ndarray:
    """Move the hue of ``x`` by ``move`` <= half the chroma (rounded up) along the hexagon, red to green if ``forward``.

    With ``ahead`` the channel after c in the direction of turning (R, G, B, R, ... forward): c rises where the channel
    behind it leads, once ``ahead`` has fallen to the lowest level, and falls where ``ahead`` has reached the highest.
    Both at once cannot be with such a ``move``, and the clipping does the rest.
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
    """Blur with a 9 x 9 Gaussian of ``sigma`` pixels, mirrored at the border (the edge row itself once).

    Two passes of 16-bit integers over the padded image seen as one flat row, so that a shift is a slice. Weights are
    rounded to 1/256; mean difference from the float convolution below a tenth of a level.
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
    """Weights of the centre and of the taps at distance 1, 2, ... (symmetric), whole numbers that sum to 256."""
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
