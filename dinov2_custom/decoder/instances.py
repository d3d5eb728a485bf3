"""Labels of one image and their checks: boxes, outlines as polygons or run lengths, and masks of class indices."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dinov2_custom.data.decode import decode_rgb, formats, image_errors, loaded, open_image
from dinov2_custom.data.sources import read_file
from dinov2_custom.errors import DataError, optional

IGNORE = 255  # value of pixels without a class
SHOWN = 20
LONGEST = 600  # characters of a fault
MARGIN = 1.0  # pixels that rounding may place a box or point outside its image

Box = tuple[float, float, float, float]
Outline = list[list[float]] | dict[str, Any]


class Instance(NamedTuple):
    """One labelled object.

    category: index into the classes, from 0. box: x, y, width, height in pixels. segmentation: polygons (lists x, y, x,
    y, ...), COCO's run lengths {size, counts}, or None. area: in square pixels. crowd: a group marked as one.
    """

    category: int
    box: Box
    segmentation: Outline | None
    area: float
    crowd: bool


class LabelledImage(NamedTuple):
    """An image and its labels: instances, or the index PNG ``mask`` of the classes of its pixels.

    ``background``: value of :func:`semantic_mask` outside all instances.
    """

    path: Path
    width: int
    height: int
    instances: tuple[Instance, ...]
    mask: Path | None
    background: int = IGNORE


class Split(NamedTuple):
    """The images of one part of a dataset; categories are indices into ``classes``."""

    classes: tuple[str, ...]
    images: tuple[LabelledImage, ...]


class Faults:
    """All faults of labels, of which the first are shown, and the number of boxes or outlines clipped."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0
        self.clipped = 0

    def add(self, where: str, text: str) -> None:
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append(_shown(f"{where}: {text}" if where else text))

    def raise_if_any(self, what: str) -> None:
        """Raise one DataError with the first faults and the number of all."""
        if not self.count:
            return
        more = [f"  ... and {self.count - SHOWN:,} more"] if self.count > SHOWN else []
        number = "1 fault" if self.count == 1 else f"{self.count:,} faults"
        lines = [f"expected labels without faults in {what}, got {number}:", *(f"  - {line}" for line in self.lines)]
        raise DataError("\n".join([*lines, *more]))


def _shown(line: str) -> str:
    """Return ``line`` without what names and ids of label files may contain: control characters, or megabytes."""
    line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line[: LONGEST + 1])
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 100]} ... {line[-90:]}"


# images and masks


def image_size(path: str) -> tuple[int, int] | str:
    """Return (width, height) from an image file's header, or why it cannot be read."""
    try:
        if os.path.isfile(path):  # opening a named pipe blocks
            with Image.open(path, formats=formats()) as image:
                return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass  # the decoder names the reason, and opens some files that Pillow does not
    try:
        return decode_rgb(read_file(path), path).size
    except DataError as e:
        return str(e)


def read_mask(path: str | Path) -> np.ndarray:
    """Return the values of an index image, (H, W), uint8 or larger.

    Raises:
        DataError: it cannot be read, or has colours.
    """
    data = read_file(path)
    with image_errors(data, str(path)):
        image = loaded(open_image(data), data)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise DataError(f"expected an image of class indices (grey or palette), got {image.mode}: {path}")
    return np.asarray(image, dtype=np.uint8 if image.mode in ("1", "L", "P") else None)


def semantic_mask(image: LabelledImage, num_classes: int) -> np.ndarray:
    """Return the class of every pixel, uint8 (H, W); 255: none.

    Of overlapping instances, the smaller one is on top.

    Raises:
        DataError: the mask has other values or another size than when it was checked.
    """
    if image.mask is not None:
        values = read_mask(image.mask)
    else:
        values = np.full((image.height, image.width), image.background, np.uint8)
        for one in sorted(image.instances, key=lambda one: -one.area):
            values[instance_mask(one, image.height, image.width)] = one.category
    if values.shape != (image.height, image.width) or bool(((values >= num_classes) & (values != IGNORE)).any()):
        place = image.mask or image.path
        raise DataError(
            f"expected {image.width} x {image.height} values below {num_classes} or {IGNORE}, as when the labels were "
            f"checked, got others: {place}; do not change labels during training"
        )
    return values.astype(np.uint8)


def instance_mask(instance: Instance, height: int, width: int) -> np.ndarray:
    """Return the pixels of an instance, bool (H, W).

    Raises:
        DataError: it has no outline, or run lengths of another size.
    """
    outline = instance.segmentation
    if not outline:
        raise DataError("expected an instance with an outline, got only its box; read labels with task='instance'")
    if isinstance(outline, list):
        outline = encode_outline(outline, width, height)
    runs = run_lengths(outline, width, height)
    if isinstance(runs, str):
        raise DataError(runs)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


# checks


def as_numbers(values: Any) -> list[float] | None:
    """Return ``values`` as finite floats, or None; text is accepted from label files, not booleans."""
    try:
        found = [float(value) for value in values if not isinstance(value, bool)]
    except (TypeError, ValueError, OverflowError):
        return None
    return found if len(found) == len(values) and all(map(math.isfinite, found)) else None


def check_box(values: Any, width: int, height: int, faults: Faults, where: str) -> Box | None:
    """Return a box (x, y, width, height), clipped to the image by at most 1 pixel; None after adding a fault."""
    box = as_numbers(values) if isinstance(values, list | tuple) else None
    if box is None or len(box) != 4:
        faults.add(where, f"expected a box x, y, width, height, got {values!r:.60}")
        return None
    x, y, w, h = box
    text = f"({x:.6g}, {y:.6g}, {w:.6g}, {h:.6g})"
    if w <= 0 or h <= 0:
        faults.add(where, f"expected a box with an area, got {text}")
        return None
    outside = max(-x, -y, x + w - width, y + h - height)
    if outside > MARGIN:
        faults.add(where, f"expected a box inside the image of {width} x {height}, got {text}")
        return None
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        faults.add(where, f"expected a box inside the image of {width} x {height}, got {text}")
        return None
    if outside <= 0:
        return x, y, w, h
    faults.clipped += outside > 1e-6  # less is the rounding of fractions
    return left, top, right - left, bottom - top


def check_outline(value: Any, width: int, height: int, faults: Faults, where: str) -> Outline | None:
    """Return polygons, clipped to the image by at most 1 pixel, or run lengths; None after adding a fault."""
    if isinstance(value, dict):
        runs = run_lengths(value, width, height)
        if isinstance(runs, str) or sum(runs[1::2]) == 0:
            faults.add(where, runs if isinstance(runs, str) else "expected run lengths with pixels, got none")
            return None
        return {"size": [height, width], "counts": value["counts"]}
    polygons = [as_numbers(one) if isinstance(one, list) else None for one in value] if isinstance(value, list) else []
    if not polygons or any(one is None or len(one) < 6 or len(one) % 2 for one in polygons):
        faults.add(where, "expected an outline: polygons of 3 or more points, or run lengths")
        return None
    outside = max(max(-min(one), max(one[::2]) - width, max(one[1::2]) - height) for one in polygons)
    if outside > MARGIN:
        inside = f"expected an outline inside the image of {width} x {height}"
        faults.add(where, f"{inside}, got a point {outside:.6g} pixels outside")
        return None
    if outside > 0:
        faults.clipped += outside > 1e-6
        limits = (width, height)
        polygons = [[min(max(v, 0.0), limits[at % 2]) for at, v in enumerate(one)] for one in polygons]
    if area_of(polygons) <= 0:
        faults.add(where, "expected an outline with an area, got a line or point")
        return None
    return polygons


def area_of(outline: Outline) -> float:
    """Return the area of polygons, of which none overlap, or of checked run lengths."""
    if isinstance(outline, dict):
        height, width = outline["size"]
        return float(sum(run_lengths(outline, width, height)[1::2]))
    total = 0.0
    for one in outline:
        x, y = np.array(one[::2]), np.array(one[1::2])
        total += abs(float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())) / 2
    return total


def run_lengths(outline: dict[str, Any], width: int, height: int) -> Sequence[int] | str:
    """Return COCO's run lengths (column by column; first those of the background), or what is wrong with them."""
    size, counts = outline.get("size"), outline.get("counts")
    if size not in ([height, width], (height, width)):
        return f"expected run lengths of size [{height}, {width}], got {size!r:.40}"
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    runs = _decompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return "expected run lengths, a list of numbers or COCO's text, got others"
    if sum(runs) != height * width:
        return f"expected run lengths of {height * width:,} pixels in total, got {sum(runs):,}"
    return runs


def _decompress(text: str) -> list[int] | None:
    """Return the run lengths of COCO's text, or None.

    Six bits a character, from "0" on: five of the number, least significant first, and one that tells whether more
    follow; the highest bit of a number is its sign. From the fourth on, numbers are differences to the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for code in map(ord, text):
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return None if shift else runs


def encode_outline(outline: Outline, width: int, height: int) -> dict[str, Any]:
    """Return an outline as pycocotools takes it for measures."""
    coco = optional("pycocotools.mask", "outlines of instances", DataError)
    if isinstance(outline, list):
        return coco.merge(coco.frPyObjects(outline, height, width))
    runs = run_lengths(outline, width, height)
    if isinstance(runs, str):
        raise DataError(runs)
    return coco.frPyObjects({"size": [height, width], "counts": list(runs)}, height, width)
