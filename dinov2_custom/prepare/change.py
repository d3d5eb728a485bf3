"""Convert one image file to the files written for it: unchanged, shrunk, converted, or none if it is bad.

Files that need no change are copied byte for byte. Pixels follow the rules of ``data.decode`` (16-bit and float to 8
bits, alpha dropped, first frame); grey images remain grey, and the EXIF orientation remains in the file.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from PIL import Image

from dinov2_custom.data.decode import as_image, open_page, to_rgb
from dinov2_custom.data.depth import Deep, Reading
from dinov2_custom.verify.check import Checked, check_image

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
}
WRITTEN_AS = {"JPEG": "JPEG", "WEBP": "WEBP"}  # formats kept when pixels change; others become PNG
DRAFT = 2  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is at least this multiple of the target
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Options:
    """Changes to make; 0 disables one. ``tile_above`` is in megapixels, the others in pixels.

    ``intensity`` and ``page``: see ``data.depth.Reading``.
    """

    short_side: int = 0
    format: str = "keep"
    quality: int = 90
    tile: int = 0
    tile_above: float = 50.0
    intensity: tuple[float, float] | None = None
    page: int = 0

    @property
    def reading(self) -> Reading:
        return Reading(self.intensity, self.page)


class Output(NamedTuple):
    """A file to write; ``name`` is relative, with "/" as separator."""

    name: str
    data: bytes
    width: int
    height: int


class Prepared(NamedTuple):
    """Outcome for one image. ``action``: kept, changed, tiled or bad; ``spool``: a tar with many outputs."""

    action: str
    outputs: tuple[Output, ...] = ()
    reason: str = ""
    num_bytes: int = 0
    spool: str = ""


def prepare_image(data: bytes, name: str, options: Options, simplejpeg: ModuleType | None = None) -> Prepared:
    """Check the bytes of an image file and convert them according to ``options``.

    Args:
        name: desired name of the output; its suffix is adapted to the format.
        simplejpeg: see ``verify.check.check_image``.
    """
    found = check_image(data, simplejpeg)
    if found.reason:
        return Prepared("bad", reason=found.reason, num_bytes=len(data))
    target = target_format(found.format, options, changed=False)
    try:
        size = _size_of_page(data, found, options.page)
        width, height = shrunk_size(*size, options.short_side)
        if target == found.format and (width, height) == size:
            output = Output(with_suffix(name, found.format), data, width, height)
            return Prepared("kept", (output,), num_bytes=len(data))
        target = target_format(found.format, options, changed=True)
        changed = encode(*_pixels(data, found, (width, height), options.reading), target, options.quality)
    except MemoryError:
        raise
    except Exception as e:  # anything raised by Pillow's codecs is caused by the image
        return Prepared("bad", reason=f"not changed: {type(e).__name__}: {e}", num_bytes=len(data))
    return Prepared("changed", (Output(with_suffix(name, target), changed, width, height),), num_bytes=len(data))


def target_format(format: str, options: Options, changed: bool) -> str:
    """Return Pillow's name of the output format for a file of ``format``."""
    if options.format != "keep":
        return options.format.upper()
    return WRITTEN_AS.get(format, "PNG") if changed else format


def shrunk_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return (width, height) scaled so that the shorter side is at most ``short_side`` (0: no limit)."""
    shorter = min(width, height)
    if not short_side or shorter <= short_side:
        return width, height
    return max(1, round(width * short_side / shorter)), max(1, round(height * short_side / shorter))


def with_suffix(name: str, format: str) -> str:
    """Return ``name`` with a suffix for ``format``, replacing a wrong image suffix and keeping a correct one."""
    allowed = SUFFIXES.get(format, (f".{format.lower()}",))
    stem, dot, suffix = name.rpartition(".")
    if dot and f".{suffix.lower()}" in allowed:
        return name
    known = dot and any(f".{suffix.lower()}" in one for one in SUFFIXES.values())
    return (stem if known else name) + allowed[0]


def _size_of_page(data: bytes, found: Checked, page: int) -> tuple[int, int]:
    """Return (width, height) of the page that is read; ``found`` describes the first page."""
    if not page:
        return found.width, found.height
    image = open_page(data, page)
    return image.values.shape[1::-1] if isinstance(image, Deep) else image.size


def _pixels(data: bytes, found: Checked, size: tuple[int, int], reading: Reading) -> tuple[Image.Image, int]:
    """Return (image of ``size`` in mode RGB or L, EXIF orientation)."""
    image = open_page(data, reading.page)
    if isinstance(image, Deep):
        image, orientation, grey = as_image(image, reading), 1, image.values.ndim == 2
    else:
        orientation = _orientation(image)
        if found.format == "JPEG" and size != image.size:
            image.draft(None, (DRAFT * size[0], DRAFT * size[1]))
        grey = image.mode in ("L", "1", "I", "F") or image.mode.startswith("I;16")
        image = to_rgb(image, data, reading)
    image = image.getchannel(0) if grey else image
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image, orientation


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or 1 if none can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = image.getexif().get(ORIENTATION, 1)
        return found if found in range(1, 9) else 1
    except Exception:  # corrupt metadata must not discard the pixels
        return 1


def encode(image: Image.Image, orientation: int, format: str, quality: int) -> bytes:
    """Return the bytes of an image file whose only metadata is the orientation, if it is not the default."""
    clean = Image.new(image.mode, (1, 1)).getexif()
    if orientation != 1:
        clean[ORIENTATION] = orientation
    settings: dict = {"JPEG": {"quality": quality}, "WEBP": {"quality": quality}}.get(format, {})
    if len(clean):
        settings["exif"] = clean.tobytes()
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()
