"""Cut crops out of an image and resize them, by the fastest of three kernels on this machine.

"compiled" is ours (``resize.c``), which takes all crops of an image at once; "torch" has a vector kernel for x86 with
AVX2 and is slow elsewhere; "Pillow" is always there. The pixels of "compiled" and "Pillow" are the same (Pillow 13 goes
down before across for some boxes, which changes the rounding of the levels between), those of "torch" a few hundredths
of a level from them. Read :func:`cut_crops` first.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .draws import Box
from .native import crop_cutter

logger = logging.getLogger("dinov2")
CLEARLY = 1.5  # times faster than a kernel before it in KERNELS: else timings that waver would change pixels
TRIES = 5


def cut_crops(
    outs: Sequence[np.ndarray],
    pixels: np.ndarray | torch.Tensor,
    boxes: Sequence[Box],
    flips: Sequence[bool],
    kernel: str | None = None,
) -> None:
    """Cut each of ``boxes`` = (left, top, width, height) out of ``pixels`` (H, W, 3) and resize it into its ``out``.

    uint8; ``outs`` are contiguous, (size, size, 3). Bicubic with antialiasing; pixels outside a box have no say. A true
    ``flip`` mirrors left and right. ``kernel``: one of ``KERNELS``, by default the fastest here.
    """
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.numpy()
    if pixels.strides[1:] != (3, 1):
        pixels = np.ascontiguousarray(pixels)
    if len(outs):
        KERNELS[kernel or fastest_kernel()](outs, pixels, boxes, flips)


def _compiled(outs: Sequence[np.ndarray], pixels: np.ndarray, boxes: Sequence[Box], flips: Sequence[bool]) -> None:
    crop_cutter()(outs, pixels, boxes, flips)


def _pillow(outs: Sequence[np.ndarray], pixels: np.ndarray, boxes: Sequence[Box], flips: Sequence[bool]) -> None:
    for out, (left, top, width, height), flip in zip(outs, boxes, flips, strict=True):
        crop = Image.fromarray(pixels[top : top + height, left : left + width])
        resized = np.asarray(crop.resize(out.shape[:2], Image.Resampling.BICUBIC))
        out[...] = resized[:, ::-1] if flip else resized


def _torch(outs: Sequence[np.ndarray], pixels: np.ndarray, boxes: Sequence[Box], flips: Sequence[bool]) -> None:
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for out, (left, top, width, height), flip in zip(outs, boxes, flips, strict=True):
        crop, target = whole[..., top : top + height, left : left + width], torch.from_numpy(out).permute(2, 0, 1)[None]
        torch.ops.aten._upsample_bicubic2d_aa.out(crop, out.shape[:2], False, None, None, out=target)
        if flip:
            target.copy_(target.flip(3))


KERNELS = {"compiled": _compiled, "Pillow": _pillow, "torch": _torch}


@functools.cache
def fastest_kernel() -> str:
    """Time the kernels, once a process, and return the name of the fastest; log what was chosen.

    One is preferred to those after it in ``KERNELS`` unless they are clearly faster.
    """
    names = [name for name in KERNELS if name != "compiled" or crop_cutter() is not None]
    seconds = {name: _seconds(name) for name in names}
    chosen = names[0]
    for name in names[1:]:
        if seconds[name] * CLEARLY < seconds[chosen]:
            chosen = name
    timed = ", ".join(f"{name} {1e3 * took:.2f} ms" for name, took in seconds.items())
    logger.info(f"crops are resized by {chosen}: an image's crops take {timed}")
    return chosen


def _seconds(kernel: str) -> float:
    """Return how long the usual crops of a small photograph take, at best."""
    pixels = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    boxes = [(20, 10, 440, 350), *((20 * i, 10 * i, 160, 150) for i in range(4))]
    outs = [np.empty((size, size, 3), np.uint8) for size in (224, 96, 96, 96, 96)]
    took = []
    for _ in range(TRIES):
        start = time.perf_counter()
        cut_crops(outs, pixels, boxes, [False] * len(boxes), kernel)
        took.append(time.perf_counter() - start)
    return min(took)
