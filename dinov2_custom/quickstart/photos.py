"""Cut photographs shipped with scikit-image into training tiles and held-out tiles.

Each photograph is divided into blocks, of which one in five is held out. Training tiles keep a margin to all held-out
blocks, so the two sets share no pixel.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dinov2_custom.errors import DataError, missing
from dinov2_custom.files import parse_json_object
from dinov2_custom.utils.rng import seed_for

PHOTOS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "handwriting": "text.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "print": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
DONE = "tiles.json"


class Tiling(NamedTuple):
    """Parameters of the tiling; all lengths in pixels.

    ``size`` side of a tile; ``block`` approximate side of the blocks; ``gap`` between training tiles and held-out
    blocks; ``step`` grid spacing of the tiles' corners; ``flat`` standard deviation of the grey levels below which a
    tile is skipped; ``train`` and ``held_out`` maximum tiles per photograph; ``longest`` longer side to which larger
    photographs are reduced.
    """

    size: int = 64
    block: int = 96
    gap: int = 8
    step: int = 4
    flat: float = 8.0
    train: int = 150
    held_out: int = 60
    longest: int = 1000


def open_photo(name: str, longest: int = Tiling().longest) -> Image.Image:
    """Return photograph ``name`` (a key of ``PHOTOS``) in RGB, reduced to at most ``longest`` pixels.

    Raises:
        DataError: scikit-image, or the photograph in it, is missing.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(missing("skimage", "the photographs of the quickstart"))
    path = Path(spec.submodule_search_locations[0]) / "data" / PHOTOS[name]
    if not path.is_file():
        raise DataError(f"quickstart: expected a photograph, got nothing at {path}; pip install 'scikit-image>=0.25'")
    with Image.open(path) as image:
        photo = image.convert("RGB")
    if max(photo.size) > longest:
        photo.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return photo


def cut_photos(folder: str | Path, tiling: Tiling | None = None, seed: int = 0) -> dict[str, dict[str, int]]:
    """Write ``train/<photo>/*.png`` and ``held_out/<photo>/*.png`` below ``folder``; return counts by set and photo.

    Tiles are grey, so that colour alone does not identify a photograph. A file's name gives its position:
    ``y<top>_x<left>.png``. A folder that holds the same tiles already is left as it is.
    """
    tiling = tiling or Tiling()
    folder = Path(folder)
    design = {"photos": PHOTOS, "tiling": tiling._asdict(), "seed": seed}
    done = folder / DONE
    with contextlib.suppress(OSError, ValueError):  # missing or torn: cut again
        known = parse_json_object(done.read_text())
        if known.get("design") == design:
            return known["counts"]
    counts: dict[str, dict[str, int]] = {"train": {}, "held_out": {}}
    for part in counts:
        shutil.rmtree(folder / part, ignore_errors=True)
    for name in PHOTOS:
        gray = open_photo(name, tiling.longest).convert("L")
        for part, corners in choose_corners(np.asarray(gray), tiling, seed, name).items():
            target = folder / part / name
            target.mkdir(parents=True)
            for top, left in corners:
                tile = gray.crop((left, top, left + tiling.size, top + tiling.size))
                tile.save(target / f"y{top:04d}_x{left:04d}.png")
            counts[part][name] = len(corners)
    done.write_text(json.dumps({"design": design, "counts": counts}, indent=1))
    return counts


def choose_corners(gray: np.ndarray, tiling: Tiling, seed: int, name: str) -> dict[str, list[tuple[int, int]]]:
    """Return the (top, left) corners of the tiles of a photograph ``gray`` (H, W), by set."""
    blocks = held_out_blocks(*gray.shape, tiling.block)
    chosen = {}
    for part, corners in {
        "train": training_corners(gray.shape, blocks, tiling),
        "held_out": corners_inside(blocks, tiling),
    }.items():
        textured = [c for c in corners if _tile(gray, c, tiling.size).std() >= tiling.flat]
        limit = tiling.train if part == "train" else tiling.held_out
        order = np.random.default_rng(seed_for(seed, "tiles", name, part)).permutation(len(textured))
        chosen[part] = sorted(textured[i] for i in order[:limit])
    return chosen


def held_out_blocks(height: int, width: int, block: int) -> list[tuple[int, int, int, int]]:
    """Return (top, left, bottom, right) of one block in five of a photograph, spaced like a knight's moves."""
    rows, columns = max(height // block, 1), max(width // block, 1)
    return [
        (i * height // rows, j * width // columns, (i + 1) * height // rows, (j + 1) * width // columns)
        for i in range(rows)
        for j in range(columns)
        if (i + 2 * j) % 5 == 1
    ]


def corners_inside(blocks: list[tuple[int, int, int, int]], tiling: Tiling) -> list[tuple[int, int]]:
    """Return the corners of all tiles that lie entirely in one of ``blocks``."""
    return [
        (y, x)
        for top, left, bottom, right in blocks
        for y in range(top, bottom - tiling.size + 1, tiling.step)
        for x in range(left, right - tiling.size + 1, tiling.step)
    ]


def training_corners(
    shape: tuple[int, int], blocks: list[tuple[int, int, int, int]], tiling: Tiling
) -> list[tuple[int, int]]:
    """Return the corners of all tiles of a photograph that stay ``gap`` pixels away from all of ``blocks``."""
    height, width = shape
    reach = tiling.size + tiling.gap
    return [
        (y, x)
        for y in range(0, height - tiling.size + 1, tiling.step)
        for x in range(0, width - tiling.size + 1, tiling.step)
        if not any(
            top - reach < y < bottom + tiling.gap and left - reach < x < right + tiling.gap
            for top, left, bottom, right in blocks
        )
    ]


def _tile(gray: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    top, left = corner
    return gray[top : top + size, left : left + size]
