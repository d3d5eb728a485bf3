"""Finish a batch on the model's device: change the colours of uint8 crops and normalise them to float.

The colour operations are those of ``pixels``, batched, on any device, and exact: all of them are sums and products of
whole numbers below 2**24, which float32 holds, so the same parameters give the same levels as on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dinov2_custom.utils.transfer import to_device

from .draws import CropDraw
from .pixels import BLUR_RADIUS, SOLARIZE_THRESHOLD, blend_gain, blur_weights, hue_sextants

STEPS = ("brightness", "contrast", "saturation", "hue")
NUM_STEPS = len(STEPS)
CODES = {name: float(code) for code, name in enumerate(STEPS, start=1)}
# a row of parameters: code and value of each step in order of application, grey, solarize, blur weights
GRAY, SOLARIZE, BLUR = 2 * NUM_STEPS, 2 * NUM_STEPS + 1, 2 * NUM_STEPS + 2
NUM_PARAMETERS = BLUR + BLUR_RADIUS + 1


def pack_draw(draw: CropDraw, row: np.ndarray) -> None:
    """Write the colour changes of ``draw`` to ``row``, ``NUM_PARAMETERS`` float32; all zeros change nothing."""
    values = [0.0] * NUM_PARAMETERS
    for i, (name, value) in enumerate(draw.jitter):
        if name == "hue":
            change = hue_sextants(value)
        else:
            gain, shift = blend_gain(value)
            change = gain / (1 << shift)
        if change:
            values[2 * i], values[2 * i + 1] = CODES[name], change
    values[GRAY], values[SOLARIZE] = draw.gray, draw.solarize
    if draw.sigma is not None:
        weights = blur_weights(draw.sigma)
        if len(weights) > 1:
            values[BLUR : BLUR + len(weights)] = weights
    row[:] = values


class Finisher:
    """Turn uint8 crops into model input: on ``device``, normalised, in ``dtype``.

    ``mean`` and ``std`` are the statistics of R, G, B in 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32):
        mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
        self.scale = (1 / (255 * std)).astype(np.float32)
        self.offset = (mean / std).astype(np.float32)
        self.dtype = dtype

    def __call__(self, crops: Tensor, device: torch.device | str, colours: np.ndarray | None = None) -> Tensor:
        """Return (N, 3, S, S) in ``dtype`` on ``device``.

        ``crops``: uint8 (N, 3, S, S), or (N, S, S, 3) if ``colours`` is given. ``colours``: rows of :func:`pack_draw`,
        (N, ``NUM_PARAMETERS``), which are applied.
        """
        device = torch.device(device)
        levels = to_device(crops, device)
        if colours is None:
            levels = levels.float()
        else:
            levels = levels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            apply_colours(levels, colours)
        scale, offset = (to_device(torch.from_numpy(v), device)[:, None, None] for v in (self.scale, self.offset))
        return levels.mul_(scale).sub_(offset).to(self.dtype)


def apply_colours(levels: Tensor, colours: np.ndarray) -> None:
    """Change crops ``levels`` (N, 3, S, S), float32 in 0..255, in place, each by its row of ``colours``."""
    device = levels.device
    groups, names = [], []
    for i in range(NUM_STEPS):
        for name, code in CODES.items():
            groups.append(np.flatnonzero(colours[:, 2 * i] == code))
            names.append((name, 2 * i + 1))
    for name, column in (("gray", GRAY), ("blur", BLUR), ("solarize", SOLARIZE)):
        groups.append(np.flatnonzero(colours[:, column]))
        names.append((name, column))
    rows = to_device(torch.from_numpy(np.concatenate(groups)), device)
    values = to_device(torch.from_numpy(np.ascontiguousarray(colours)), device)
    start = 0
    for group, (name, column) in zip(groups, names, strict=True):
        index = rows[start : start + len(group)]
        start += len(group)
        if len(group):
            changed = _change(name, levels[index], values[index], column, colours[group, column])
            levels.index_copy_(0, index, changed)


def _change(name: str, x: Tensor, values: Tensor, column: int, on_host: np.ndarray) -> Tensor:
    """Apply one operation to the crops ``x`` with the parameter rows ``values``."""
    if name == "gray":
        return luma(x).expand_as(x)
    if name == "blur":
        return blur(x, values[:, BLUR:])
    if name == "solarize":
        return torch.where(x < SOLARIZE_THRESHOLD, x, 255 - x)
    value = values[:, column, None, None, None]
    if name == "hue":
        return turn_hue(x, value, passes=int(np.ceil(np.abs(on_host).max() / 0.5)))
    base = x.new_zeros(()) if name == "brightness" else luma(x)
    if name == "contrast":
        size = base[0].numel()
        total = base.sum(dim=(1, 2, 3), dtype=torch.int64)
        base = ((2 * total + size) // (2 * size)).to(x.dtype)[:, None, None, None]
    return (x + ((x - base) * value).floor_()).clamp_(0, 255)


def luma(x: Tensor) -> Tensor:
    """Return the grey level (N, 1, S, S), rounded as ``pixels.luma`` does."""
    red, green, blue = x.split(1, dim=1)
    return torch.floor((77 * red + 150 * green + 29 * blue + 128) / 256)


def turn_hue(x: Tensor, sextants: Tensor, passes: int) -> Tensor:
    """Shift the hue as ``pixels.adjust_hue`` does by signed ``sextants`` (N, 1, 1, 1), at most ``passes`` halves."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    total = torch.round((high - low) * sextants.abs())
    own_passes = torch.ceil(sextants.abs() / 0.5)
    forward = sextants > 0
    for i in range(passes):
        now = torch.clamp(own_passes, max=i + 1)
        before = torch.clamp(own_passes, max=i)
        move = torch.floor(total * now / own_passes) - torch.floor(total * before / own_passes)
        ahead = torch.where(forward, x.roll(-1, 1), x.roll(1, 1))
        risen = torch.minimum(torch.maximum(low + move - ahead + x, x), high)
        x = torch.maximum(torch.minimum(risen - ahead + high - move, risen), low)
    return x


def blur(x: Tensor, weights: Tensor) -> Tensor:
    """Blur each crop with its own symmetric ``weights`` (N, radius + 1), whole numbers that sum to 256."""
    radius = weights.shape[1] - 1
    for dim in (2, 3):
        size = x.shape[dim]
        places = torch.arange(-radius, size + radius, device=x.device)
        padded = x.index_select(dim, _reflect(places, size))
        total = weights[:, 0, None, None, None] * x + 128
        for distance in range(1, radius + 1):
            pair = padded.narrow(dim, radius - distance, size) + padded.narrow(dim, radius + distance, size)
            total.addcmul_(weights[:, distance, None, None, None], pair)
        x = torch.floor(total / 256)
    return x


def _reflect(places: Tensor, size: int) -> Tensor:
    """Reflect indices outside 0..size-1 at the border without repeating the edge, as often as needed."""
    period = max(1, 2 * (size - 1))
    places = torch.remainder(places, period)
    return torch.minimum(places, period - places)
