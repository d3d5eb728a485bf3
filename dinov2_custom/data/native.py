"""The colour changes in C, where this machine has a C compiler: compiled once, checked against Python, same pixels.

The source is ``colours.c`` beside this file; the library is kept in ``$XDG_CACHE_HOME/dinov2_custom`` (else
``~/.cache/dinov2_custom``) under a name made of the source and the processor. Without a compiler, or if anything about
it fails, ``image_ops`` does the work. Read :func:`colour_changer` first.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .draws import CropDraw, Recipe, draw_jitter
from .finish import NUM_PARAMETERS, NUM_STEPS, pack_draw

logger = logging.getLogger("dinov2")
SOURCE = Path(__file__).with_name("colours.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-std=c99", "-shared", "-fPIC")
OF_THIS_PROCESSOR = (("-march=native",), ("-mcpu=native",), ())
TIMEOUT_S = 60
MARGIN = 9  # rows of scratch memory beyond the crop's own

Changer = Callable[[np.ndarray, np.ndarray, CropDraw], bool]


@functools.cache
def colour_changer() -> Changer | None:
    """Return ``change(out, pixels, draw)``, or None where there is none.

    It flips and changes the colours of ``pixels``, uint8 (S, S, 3), as ``draw`` says, to ``out``, (3, S, S); both
    contiguous. It returns False, without having written, for a draw that is not for it (factors beyond 129). The
    pixels are those of ``augmentations.render_uint8``.
    """
    try:
        change = _load(_compiled())
        if not agrees(change):
            raise OSError("its pixels differ")
        return change
    except (OSError, subprocess.SubprocessError, AttributeError) as e:
        logger.info(f"colours are changed by numpy, at about half the speed of compiled code: {e}")
        return None


def _load(library: Path) -> Changer:
    function = ctypes.CDLL(str(library)).change_colours
    function.restype = None
    row = np.zeros(NUM_PARAMETERS, np.float32)
    values, row_at = row[1 : 2 * NUM_STEPS : 2], ctypes.c_void_p(row.ctypes.data)
    scratch: dict[int, ctypes.Array] = {}

    def change(out: np.ndarray, pixels: np.ndarray, draw: CropDraw) -> bool:
        size = len(pixels)
        pack_draw(draw, row)
        if np.abs(values).max() > 128:
            return False
        if size not in scratch:
            scratch[size] = ctypes.create_string_buffer((size + MARGIN) * size + 64)
        source, target = ctypes.c_void_p(pixels.ctypes.data), ctypes.c_void_p(out.ctypes.data)
        function(source, target, size, int(draw.flip), row_at, scratch[size])
        return True

    return change


def agrees(change: Changer) -> bool:
    """Whether ``change`` makes the pixels of the Python code for some dozens of draws."""
    from .augmentations import change_colours

    rng, numbers = random.Random(0), np.random.default_rng(0)
    recipe = Recipe(hue=0.5, brightness=0.8, contrast=0.8, saturation=0.8)
    for i in range(32):
        size = (4, 11, 16, 37)[i % 4]
        pixels = numbers.integers(0, 256, (size, size, 3), dtype=np.uint8)
        sigma = rng.uniform(0.1, 2.0) if i % 3 else None
        draw = CropDraw((0, 0, 1, 1), i % 4 < 2, draw_jitter(rng, recipe), i % 5 == 0, sigma, i % 2 == 0)
        turned = pixels[:, ::-1] if draw.flip else pixels
        expected = change_colours(np.ascontiguousarray(turned.transpose(2, 0, 1)), draw)
        out = np.empty((3, size, size), np.uint8)
        if not change(out, pixels, draw) or (out != expected).any():
            return False
    return True


def _compiled() -> Path:
    """Return the path of the compiled library, compiling it first where it is missing."""
    source = SOURCE.read_bytes()
    name = hashlib.blake2b(source + repr((FLAGS, _processor())).encode(), digest_size=12).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinov2_custom"
    library = folder / f"colours-{name}.so"
    if library.is_file():
        return library
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise OSError(f"no C compiler ({', '.join(COMPILERS)})")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "colours.so"
        for more in OF_THIS_PROCESSOR:
            command = [compiler, *FLAGS, *more, "-o", str(made), str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            if done.returncode == 0:
                os.replace(made, library)  # at once: other processes may be waiting for it
                return library
    raise OSError(f"{compiler} failed: {(done.stderr.strip().splitlines() or [''])[-1]}")


def _processor() -> str:
    """Name what the compiler optimises for; nodes of a cluster may share one cache."""
    text = f"{platform.system()} {platform.machine()} {platform.processor()}"
    try:
        with open("/proc/cpuinfo") as file:
            kinds = {line for line in file if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        return text
    return text + "".join(sorted(kinds))
