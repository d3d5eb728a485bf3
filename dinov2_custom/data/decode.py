"""Decode the bytes of an image file to RGB pixels by the rules below; undecodable files raise a DataError.

============================  ==========================================================================================
8-bit RGB, grey, 1-bit        unchanged; grey and 1-bit are repeated in all three channels
palette, CMYK, YCbCr, Lab     Pillow's conversion to RGB; an uncompressed YCbCr TIFF needs Pillow 13
alpha (RGBA, LA, palette)     dropped, as upstream does (transparent pixels show their hidden colour)
more than 8 bits              linear: ``Reading.intensity``, one range for all images of a dataset, becomes 0..255
the same without a range      16-bit and 12-bit grey by bit depth; integers in 0..65535 and floats in 0..1 likewise;
                              other numbers least -> 0, greatest -> 255; of 16-bit RGB the high bytes
NaN, GDAL's nodata            0
signed 8-bit grey TIFF        value + 128
white-is-zero TIFF            turned to black-is-zero first
TIFF that Pillow cannot read  through tifffile and imagecodecs where they are installed (the extra ``slides``)
several frames or pages       the one selected by ``Reading.page``, by default the first
EXIF orientation              ignored, as upstream does, unless ``exif=True``; Pillow always applies it to TIFF
above Pillow's limit          DataError (179 million pixels: a decompression bomb, or a slide to cut into tiles)
============================  ==========================================================================================

Scaling without a range is logged once per kind of image. JPEG files are decoded by simplejpeg if it is installed (the
extra ``fast``), with identical pixels, and by Pillow if simplejpeg rejects them. No other module calls a decoder.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dinov2_custom.errors import UnreadableImageError, shortage

from .depth import (
    TIFF,
    Deep,
    Reading,
    deep_values,
    is_deep,
    is_misread,
    signed_bytes,
    to_levels,
    values_by_tifffile,
    warn_once,
)
from .listing import HEIF_BRANDS

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000")
PNG_METADATA = (b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"eXIf")
READING = Reading()
DCT_FRAMES = (b"\xc0", b"\xc1", b"\xc2", b"\xc9", b"\xca")  # baseline, sequential, progressive; arithmetic coding
# DHT, DAC, DQT, DRI, APP0 to APP15, COM
BEFORE_FRAME = tuple(bytes([code]) for code in (0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE))
PNG = b"\x89PNG\r\n\x1a\n"
LARGE, STRIP = 1 << 23, 1 << 20  # bytes
DESCRIPTION, LONGEST = 270, 300  # tag of a TIFF page; longer descriptions are XML about the whole file
NOT_THE_SLIDE = re.compile(r"(?<![a-z])(label|macro|thumbnail)(?![a-z])", re.IGNORECASE)
SEVERAL_PAGES = "files with several pages or frames, of which one is used (data.page)"
OTHER_PAGE = "pages described as label, macro or thumbnail (data.page chooses another)"
Shrink = Callable[[int, int], int]


def decode_rgb(data: bytes, source: str = "image", *, exif: bool = False, reading: Reading = READING) -> Image.Image:
    """Decode the bytes of an image file into a PIL image of mode RGB, by the rules above.

    ``source`` names the image in errors. ``exif``: rotate the image according to its EXIF orientation.

    Raises:
        DataError: if the file is empty, truncated, corrupt, not an image, or too large.
    """
    return _decode_by_pillow(data, source, exif, None, reading)


def decode_array(
    data: bytes,
    source: str = "image",
    *,
    exif: bool = False,
    reading: Reading = READING,
    shrink: Shrink | None = None,
    scratch: Scratch | None = None,
) -> np.ndarray:
    """Like :func:`decode_rgb`, as a writeable uint8 (H, W, 3) array.

    ``shrink(width, height)`` returns a denominator 1, 2, 4 or 8, at most the shorter side: a JPEG is decoded at that
    fraction of its size (rounded up), other files in full. ``scratch``: memory to decode into; the returned array is
    valid until the next use of ``scratch``.
    """
    pixels = None if exif else _decode_by_simplejpeg(data, shrink, scratch)
    return _as_array(_decode_by_pillow(data, source, exif, shrink, reading), scratch) if pixels is None else pixels


class Scratch:
    """Memory for one decoded image, reused for the next: allocating new pages costs more than filling them."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """Return ``size`` bytes; previous contents are lost."""
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]

    def __reduce__(self):
        return Scratch, ()


def _as_array(image: Image.Image, scratch: Scratch | None) -> np.ndarray:
    """Copy an RGB image to an array; large ones in cache-sized strips, as numpy makes two full copies."""
    width, height = image.size
    size = 3 * width * height
    if size < LARGE:
        return np.array(image)
    pixels = (scratch or Scratch()).take(size).reshape(height, width, 3)
    rows = max(1, STRIP // (3 * width))
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels


def _decode_by_pillow(data: bytes, source: str, exif: bool, shrink: Shrink | None, reading: Reading) -> Image.Image:
    with image_errors(data, source):
        image = open_page(data, reading.page)
        if isinstance(image, Deep):
            return as_image(image, reading)
        if shrink is not None and image.format == "JPEG" and not exif and has_dct(data):
            width, height = image.size
            fraction = shrink(width, height)
            image.draft(None, (width // fraction, height // fraction))
        rgb = to_rgb(image, data, reading)
        if exif and image.format != "TIFF":  # Pillow has already rotated TIFF images
            rgb.getexif().update(image.getexif())
            rgb = ImageOps.exif_transpose(rgb)
        return rgb


@contextmanager
def image_errors(data: bytes, source: str) -> Iterator[None]:
    """Convert exceptions raised while decoding ``data`` into errors that name ``source``."""
    if not data:
        raise UnreadableImageError(f"expected an image, got an empty file: {source}")
    try:
        yield
    except Image.DecompressionBombError as e:
        raise UnreadableImageError(f"expected fewer pixels: {source} ({e}); shrink it or cut it into tiles") from e
    except MemoryError as e:
        raise shortage(e, source) from e
    except Exception as e:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken files
        raise UnreadableImageError(f"expected an image, got {describe(data)}: {source} ({_reason(e)})") from e


def open_page(data: bytes, page: int = 0) -> Image.Image | Deep:
    """Open page ``page`` of an image file given as bytes; ``page`` is ignored for a file with a single page.

    For a TIFF that Pillow cannot read or misreads, return its values.

    Raises:
        Image.DecompressionBombError: if there are too many pixels.
        Exception: if it is not an image, or has fewer pages.
    """
    try:
        image = open_image(data)
    except (Image.DecompressionBombError, MemoryError):
        raise
    except Exception:
        if data[:4] not in TIFF:
            raise
        return values_by_tifffile(data, page)
    if is_misread(image):
        return values_by_tifffile(data, page)
    if page and (pages := num_pages(image)) > 1:
        if page >= pages:
            raise ValueError(f"data.page={page}, expected at most {pages - 1}, its last one")
        image.seek(page)
    return image


def page_note(image: Image.Image) -> str:
    """Return a note on the page of an open image, or "" if there is none."""
    return note_of_page(getattr(image, "tag_v2", {}).get(DESCRIPTION, ""), num_pages(image))


def num_pages(image: Image.Image) -> int:
    """Return the number of pages of an open image; 1 for a JPEG, whose further pictures are previews made by phones."""
    return 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)


def note_of_page(description: Any, pages: int) -> str:
    """Return a note on a page with this description in a file of ``pages`` pages, or "" if there is none."""
    if isinstance(description, str) and len(description) < LONGEST and NOT_THE_SLIDE.search(description):
        return OTHER_PAGE
    return SEVERAL_PAGES if pages > 1 else ""


def open_image(data: bytes) -> Image.Image:
    """Open the bytes of an image file of any supported format.

    Pillow rejects a PNG with more than 1 MiB of text or colour profile; such a file is opened without them.

    Raises:
        Image.DecompressionBombError: if there are too many pixels.
        Exception: whatever Pillow raises if it is not an image.
    """
    try:
        return Image.open(io.BytesIO(data), formats=formats())
    except ValueError:
        if not data.startswith(PNG):
            raise
        return Image.open(io.BytesIO(without_metadata(data)), formats=("PNG",))


def loaded(image: Image.Image, data: bytes) -> Image.Image:
    """Load the pixels of ``image``, opened from ``data``; for text chunks after the pixels see :func:`open_image`."""
    try:
        image.load()
    except ValueError:
        if image.format != "PNG":
            raise
        image = Image.open(io.BytesIO(without_metadata(data)), formats=("PNG",))
        image.load()
    return image


@functools.cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the supported formats.

    AVIF is included from Pillow 11.3 on, because Pillow raises KeyError for an unknown name; HEIC is included if
    pillow-heif is installed.
    """
    found = FORMATS
    if importlib.util.find_spec("PIL.AvifImagePlugin"):
        found += ("AVIF",)
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return found
    return (*found, "HEIF")


def without_metadata(data: bytes) -> bytes:
    """Return a PNG without its text chunks, colour profile and EXIF data.

    Source: W3C PNG specification section 5.3 (chunk layout).
    """
    kept, position = [data[: len(PNG)]], len(PNG)
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] not in PNG_METADATA:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _decode_by_simplejpeg(data: bytes, shrink: Shrink | None, scratch: Scratch | None) -> np.ndarray | None:
    """Decode a JPEG file of a kind for which simplejpeg and Pillow give identical pixels, or return None.

    None is also returned for a file with errors: Pillow may still accept it.
    """
    simplejpeg = find_simplejpeg()
    if simplejpeg is None or not has_dct(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        fraction = 1 if shrink is None else shrink(width, height)
        if fraction > 1:
            height, width = -(-height // fraction), -(-width // fraction)
        least = {} if fraction == 1 else {"min_height": height, "min_width": width}
        out = (scratch or Scratch()).take(height * width * 3)
        return simplejpeg.decode_jpeg(data, buffer=out, **least)
    except ValueError:
        return None


def has_dct(data: bytes) -> bool:
    """Return whether ``data`` is a JPEG with 8-bit DCT coefficients, the only kind that can be scaled.

    A lossless JPEG decoded at a fraction of its size overflows the buffer that simplejpeg allocates for it. Data that
    is malformed before the frame header returns False.

    Source: ITU-T T.81, annex B.2 and table B.1.
    """
    if data[:2] != b"\xff\xd8":
        return False
    position = 2
    while data[position : position + 1] == b"\xff":
        while data[position : position + 1] == b"\xff":  # fill bytes
            position += 1
        marker, length = data[position : position + 1], int.from_bytes(data[position + 1 : position + 3], "big")
        if marker in DCT_FRAMES:
            return data[position + 3 : position + 4] == b"\x08"
        if marker not in BEFORE_FRAME or length < 2:
            return False
        position += 1 + length
    return False


@functools.cache
def find_simplejpeg() -> ModuleType | None:
    """Return the module simplejpeg, or None if it is not installed or does not load."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def to_rgb(image: Image.Image, data: bytes, reading: Reading = READING) -> Image.Image:
    """Convert an open PIL image of any mode, loaded or not, to RGB by the rules above; ``data`` is its file.

    Raises:
        ValueError: if a float image has no finite value and no range is given.
        Exception: whatever Pillow raises for corrupt files.
    """
    if is_deep(image) and (reading.intensity is not None or image.mode not in ("RGB", "RGBA")):
        return as_image(values_of(image, data, reading.page), reading)
    image = loaded(image, data)
    if image.mode == "RGB":
        return image
    if (signed := signed_bytes(image)) is not None:
        warn_once("signed 8 bits", "128 is added to the values")
        return _from_levels(signed.astype(np.int16) + 128)
    if image.mode == "P":
        image.info.pop("transparency", None)
    return image.convert("RGB")


def values_of(image: Image.Image, data: bytes, page: int) -> Deep:
    """Return the values of an open image with more than 8 bits; raise as :func:`to_rgb` does."""
    try:
        return deep_values(image, lambda: open_page(data, page))
    except ValueError:
        if image.format != "PNG":
            raise
        data = without_metadata(data)  # as in loaded()
        return deep_values(open_page(data), lambda: open_page(data))


def as_image(deep: Deep, reading: Reading) -> Image.Image:
    """Return values of more than 8 bits as an RGB image; raise as :func:`to_rgb` does."""
    return _from_levels(to_levels(deep, reading.intensity))


def _from_levels(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def describe(data: bytes) -> str:
    """Describe briefly what ``data`` looks like, for an error message."""
    start = data[:64]
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
        return f"HEIC of {len(data):,} bytes, which needs the package pillow-heif (pip install pillow-heif)"
    if start[:3] == b"\xff\xd8\xff" or start[:8] == PNG:
        return f"a truncated or broken {'JPEG' if start[:1] == bytes([0xFF]) else 'PNG'} of {len(data):,} bytes"
    if start[:4] in TIFF:
        return f"a TIFF of {len(data):,} bytes that cannot be read"
    kind = "text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start) else "data"
    return f"{len(data):,} bytes of {kind}"


def _reason(e: Exception) -> str:
    """Return the exception's text without the buffer address that Pillow includes."""
    text = str(e).split(" <_io.BytesIO", 1)[0]
    return f"{type(e).__name__}: {text}"
