"""Pixel work in C, where this machine has a C compiler: compiled once, checked against Python, same pixels.

The sources are ``colours.c`` and ``resize.c`` beside this file. Without a compiler, or if anything about it fails,
``pixels`` and ``resize`` do the work in other ways. Read :func:`colour_changer` first.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import random
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .compiler import compiled
from .draws import Box, CropDraw, Recipe, draw_jitter
from .finish import NUM_PARAMETERS, NUM_STEPS, pack_draw

logger = logging.getLogger("dinov2")
COLOURS, RESIZE = (Path(__file__).with_name(name) for name in ("colours.c", "resize.c"))
MARGIN = 9  # rows of scratch memory beyond the crop's own
ALIGNED = 64

Changer = Callable[[np.ndarray, np.ndarray, CropDraw], bool]
Cutter = Callable[[Sequence[np.ndarray], np.ndarray, Sequence[Box], Sequence[bool]], None]


@functools.cache
def colour_changer() -> Changer | None:
    """Return ``change(out, pixels, draw)``, or None where there is none.

    It changes the colours of ``pixels``, uint8 (S, S, 3), as ``draw`` says, to ``out``, (3, S, S); both contiguous. It
    returns False, without having written, for a draw that is not for it (factors beyond 129). The pixels are those of
    ``augmentations.change_colours``.
    """
    return _checked(COLOURS, _load_changer, agrees, "colours are changed by numpy, at about half the speed of")


@functools.cache
def crop_cutter() -> Cutter | None:
    """Return ``cut(outs, pixels, boxes, flips)``, or None where there is none.

    It cuts the boxes (left, top, width, height) out of ``pixels``, uint8 (H, W, 3), resizes each to the size of its
    ``out``, (S, S, 3), and mirrors those with ``flip``; all contiguous. The pixels are those of Pillow's
    ``crop(..).resize(.., BICUBIC)`` where that resizes across before down (as all versions before 13 do).
    """
    return _checked(RESIZE, _load_cutter, cuts_as_pillow, "crops are resized without")


def _checked(source: Path, load: Callable, right: Callable, otherwise: str) -> Callable | None:
    try:
        function = load(compiled(source))
        if not right(function):
            raise OSError("its pixels differ")
        return function
    except (OSError, subprocess.SubprocessError, AttributeError) as e:
        logger.info(f"{otherwise} compiled code: {e}")
        return None


def _load_changer(library: Path) -> Changer:
    function = ctypes.CDLL(str(library)).change_colours
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int] + 2 * [ctypes.c_void_p]
    memory = Memory()

    def change(out: np.ndarray, pixels: np.ndarray, draw: CropDraw) -> bool:
        size = len(pixels)
        row = np.empty(NUM_PARAMETERS, np.float32)
        pack_draw(draw, row)
        if np.abs(row[1 : 2 * NUM_STEPS : 2]).max() > 128:
            return False
        function(address(pixels), address(out), size, address(row), memory.take((size + MARGIN) * size))
        return True

    return change


def _load_cutter(library: Path) -> Cutter:
    loaded = ctypes.CDLL(str(library))
    room, function = loaded.scratch_size, loaded.cut_crops
    room.restype, room.argtypes = ctypes.c_long, [ctypes.c_int, ctypes.c_void_p]
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int] + 3 * [ctypes.c_void_p]
    memory = Memory()

    def cut(outs: Sequence[np.ndarray], pixels: np.ndarray, boxes: Sequence[Box], flips: Sequence[bool]) -> None:
        sizes = [len(out) for out in outs]
        rows = [(*box, size, flip) for box, size, flip in zip(boxes, sizes, flips, strict=True)]
        numbers, places = np.array(rows, np.int32), np.array([address(out) for out in outs], np.uintp)
        scratch = memory.take(room(len(rows), address(numbers)))
        function(address(pixels), pixels.strides[0], len(rows), address(numbers), address(places), scratch)

    return cut


class Memory(threading.local):
    """Memory that is used again and again, of each thread its own."""

    def __init__(self) -> None:
        self._array = np.empty(0, np.uint8)

    def take(self, size: int) -> int:
        """Return the address of ``size`` bytes, aligned."""
        if self._array.size < size + ALIGNED:
            self._array = np.empty(size + ALIGNED, np.uint8)
        return -(-address(self._array) // ALIGNED) * ALIGNED


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def agrees(change: Changer) -> bool:
    """Whether ``change`` makes the pixels of the Python code for some dozens of draws."""
    from .augmentations import change_colours

    rng, numbers = random.Random(0), np.random.default_rng(0)
    recipe = Recipe(hue=0.5, brightness=0.8, contrast=0.8, saturation=0.8)
    for i in range(32):
        size = (4, 11, 16, 37)[i % 4]
        pixels = numbers.integers(0, 256, (size, size, 3), dtype=np.uint8)
        sigma = rng.uniform(0.1, 2.0) if i % 3 else None
        draw = CropDraw((0, 0, 1, 1), False, draw_jitter(rng, recipe), i % 5 == 0, sigma, i % 2 == 0)
        expected = change_colours(np.ascontiguousarray(pixels.transpose(2, 0, 1)), draw)
        out = np.empty((3, size, size), np.uint8)
        if not change(out, pixels, draw) or (out != expected).any():
            return False
    return True


def cuts_as_pillow(cut: Cutter) -> bool:
    """Whether ``cut`` makes Pillow's pixels, for boxes that every version of it resizes across first."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8)
    boxes = ((0, 0, 131, 90), (3, 5, 70, 66), (41, 30, 90, 17), (130, 89, 1, 1), (7, 9, 16, 16), (20, 1, 9, 7))
    outs = [np.empty((size, size, 3), np.uint8) for size in (16, 33, 5, 3, 16, 32)]
    flips = [i % 2 == 1 for i in range(len(boxes))]
    cut(outs, pixels, boxes, flips)
    for out, (left, top, width, height), flip in zip(outs, boxes, flips, strict=True):
        crop = Image.fromarray(pixels[top : top + height, left : left + width])
        expected = np.asarray(crop.resize(out.shape[:2], Image.Resampling.BICUBIC))
        if (out != (expected[:, ::-1] if flip else expected)).any():
            return False
    return True
