"""Ten families of textures, one folder each: real classes that single pixels and colours cannot distinguish.

Position, scale, direction, colours and contrast are random for every image; only the generating process is shared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dinov2_custom.utils.rng import seed_for


def make_textures(folder: Path, per_family: int = 60, size: int = 96, seed: int = 0) -> None:
    """Write ``<family>/<number>.png`` below ``folder``."""
    for family in FAMILIES:
        (folder / family).mkdir(parents=True, exist_ok=True)
        for number in range(per_family):
            texture(family, size, seed_for(seed, "texture", family, number)).save(folder / family / f"{number:03d}.png")


def texture(family: str, size: int, seed: int) -> Image.Image:
    """Return an RGB texture of ``size`` x ``size`` pixels."""
    rng = np.random.default_rng(seed)
    period, angle = np.exp(rng.uniform(np.log(7), np.log(20))), rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:size, :size] + rng.uniform(0, 100, (2, 1, 1))
    x = (np.cos(angle) * columns + np.sin(angle) * rows) / period
    y = (np.cos(angle) * rows - np.sin(angle) * columns) / period
    values = FAMILIES[family](rng, x, y).astype(np.float64)
    values = (values - values.min()) / np.ptp(values) - 0.5
    base, other = rng.uniform(70, 185, 3), rng.normal(size=3)
    contrast = rng.uniform(70, 160) * other / np.linalg.norm(other)
    light = rng.uniform(-20, 20, 2) @ (np.mgrid[:size, :size] / size - 0.5).reshape(2, -1)
    pixels = base + values[..., None] * contrast + light.reshape(size, size, 1) + rng.normal(0, 4, (size, size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _grating(rng, x, y):
    return np.sin(2 * np.pi * x)


def _checker(rng, x, y):
    return (np.floor(x) + np.floor(y)) % 2


def _bricks(rng, x, y):
    shifted = x / 2 + np.floor(y) / 2
    return np.minimum(2 * np.abs(shifted - np.round(shifted)), np.abs(y - np.round(y))) > 0.12


def _rings(rng, x, y):
    return np.sin(2 * np.pi * np.hypot(x - rng.choice(x.ravel()), y - rng.choice(y.ravel())))


def _clouds(rng, x, y):
    return _noise(rng, len(x), -1.5)


def _grain(rng, x, y):
    return _noise(rng, len(x), 0.0)


def _dots(rng, x, y):
    nearest, _ = _distances(rng, x, y)
    return nearest < 0.25


def _cells(rng, x, y):
    nearest, second = _distances(rng, x, y)
    return second - nearest < 0.12


def _mosaic(rng, x, y):
    return _distances(rng, x, y, levels=True)


def _scratches(rng, x, y):
    values = np.zeros_like(x)
    for _ in range(30):
        angle, at = rng.uniform(0, np.pi), rng.integers(x.size)
        u, v = x - x.flat[at], y - y.flat[at]
        along, across = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
        values[(np.abs(along) < 1.2) & (np.abs(across) < 0.1)] = 1
    return values


def _noise(rng, size: int, exponent: float) -> np.ndarray:
    """Return noise with an amplitude proportional to frequency ** ``exponent``."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = 1 / size
    return np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) * frequency**exponent).real


def _distances(rng, x, y, levels: bool = False):
    """Return the distances to the nearest and the second of random points, one a unit; or a level a nearest point."""
    low, high = [a.min() - 1 for a in (x, y)], [a.max() + 1 for a in (x, y)]
    count = int(np.prod(np.subtract(high, low)))
    points = rng.uniform(low, high, (count, 2))
    distances = np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1])
    if levels:
        return rng.uniform(size=count)[distances.argmin(-1)]
    return np.moveaxis(np.partition(distances, 1, axis=-1)[..., :2], -1, 0)


FAMILIES = {
    "bricks": _bricks,
    "cells": _cells,
    "checker": _checker,
    "clouds": _clouds,
    "dots": _dots,
    "grain": _grain,
    "grating": _grating,
    "mosaic": _mosaic,
    "rings": _rings,
    "scratches": _scratches,
}
