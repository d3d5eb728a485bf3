"""Images of more than 8 bits per channel: their values as declared by the file, and their conversion to 8 bits.

Source: TIFF 6.0, tags BitsPerSample, Compression, PhotometricInterpretation, PlanarConfiguration and SampleFormat;
GDAL's tag GDAL_NODATA.
"""

from __future__ import annotations

import functools
import io
import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dinov2_custom.errors import install

logger = logging.getLogger("dinov2")
BITS, COMPRESSION, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 259, 262, 284, 339
NODATA = 42113
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
UNSIGNED, SIGNED = 1, 2
SEPARATE = 2
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Pillow's names of 16-bit samples of which it keeps the high bytes (with the opposite byte order, the low bytes)
HIGH_BYTES = {f"{mode};16{order}" for mode in ("RGB", "RGBA", "RGBX") for order in "LBN"} | {"LA;16B"}
OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


class Reading(NamedTuple):
    """Options for decoding the files of a dataset.

    intensity: the values mapped to 0 and 255 in images of more than 8 bits; None applies the rules of :func:`by_depth`.
    page: the page or frame to read from a file with several.
    """

    intensity: tuple[float, float] | None = None
    page: int = 0


class Deep(NamedTuple):
    """Pixels of one image as declared by the file.

    values: (H, W) or (H, W, 3). nodata: (H, W) bool, True where a value is missing, or None if none is. top: the
    largest value of the depth if that is unsigned and at most 16 bits, otherwise None.
    """

    values: np.ndarray
    nodata: np.ndarray | None = None
    top: int | None = None

    def valid(self) -> np.ndarray:
        """Return the values without nodata, NaN and infinity, flattened."""
        values = self.values if self.nodata is None else self.values[~self.nodata]
        return values[np.isfinite(values)] if values.dtype.kind == "f" else values.ravel()


def is_deep(image: Image.Image) -> bool:
    """Return whether an image that is open but not yet loaded has more than 8 bits per channel."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16") or _raw_mode(image) in HIGH_BYTES


def is_misread(image: Image.Image) -> bool:
    """Return whether Pillow would misread the values of an open TIFF."""
    tags = getattr(image, "tag_v2", None)
    if not tags:
        return False
    swapped = image.mode in ("I", "F") and tags.prefix == b"MM" and tags.get(COMPRESSION, 1) != 1
    return swapped or (tags.get(PLANAR) == SEPARATE and max(tags.get(BITS, (8,))) > 8)


def deep_values(image: Image.Image, reopen: Callable[[], Image.Image]) -> Deep:
    """Load an image for which :func:`is_deep` is true and return its values.

    ``reopen()`` opens the same page again.

    Raises:
        Exception: whatever Pillow raises for corrupt files.
    """
    raw, tags = _raw_mode(image), getattr(image, "tag_v2", {})
    if raw not in HIGH_BYTES:
        image.load()
        return _declared(np.asarray(image), image, tags)
    low = reopen()
    low_bytes = "RGBA" if raw == "LA;16B" else raw[:-1] + OTHER_ORDER[raw[-1]]
    low.tile = [_with_raw_mode(tile, low_bytes) for tile in low.tile]
    image.load()
    low.load()
    high, low = np.asarray(image), np.asarray(low)
    if raw == "LA;16B":  # read as four bytes: grey high, grey low, alpha
        high, low = low[..., 0], low[..., 1]
    else:
        high, low = high[..., :3], low[..., :3]
    values = high.astype(np.uint16) << 8 | low
    return declared(values, 16, tags.get(NODATA), white_is_zero=False)


def _raw_mode(image: Image.Image) -> str:
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _with_raw_mode(tile: tuple, raw: str) -> tuple:
    args = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)


def _declared(values: np.ndarray, image: Image.Image, tags: Any) -> Deep:
    """Return the values of a loaded grey image of mode I;16, I or F as black-is-zero, unsigned if declared so."""
    if image.mode == "I" and tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED:
        values = values.view(np.uint32)
    bits = tags.get(BITS, (16,))[0]
    return declared(values, bits, tags.get(NODATA), white_is_zero=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)


def declared(values: np.ndarray, bits: int, nodata: str | None, *, white_is_zero: bool) -> Deep:
    """Return the values of a file as declared by its tags; ``nodata`` is the text of GDAL's tag."""
    mask = _nodata(values, nodata)
    top = (1 << bits) - 1 if values.dtype.kind == "u" and bits <= 16 else None
    return Deep(turned(values, top) if white_is_zero else values, mask, top)


def signed_bytes(image: Image.Image) -> np.ndarray | None:
    """Return the values (H, W) of a loaded 8-bit grey image declared as signed, a tag that Pillow ignores."""
    tags = getattr(image, "tag_v2", None)
    if image.mode != "L" or tags is None or tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] != SIGNED:
        return None
    return np.asarray(image).view(np.int8)


def turned(values: np.ndarray, top: int | None) -> np.ndarray:
    """Convert white-is-zero values to black-is-zero; ``top``: see :class:`Deep`."""
    if values.dtype.kind == "f":
        return 1 - values  # maps 0..1 to itself
    return (np.iinfo(values.dtype).max if top is None else values.dtype.type(top)) - values


def _nodata(values: np.ndarray, tag: str | None) -> np.ndarray | None:
    """Return a mask of the ``values`` equal to the number in the tag, or None without such a tag."""
    try:
        number = float(str(tag).strip("\0 "))
    except ValueError:  # the tag holds no number
        return None
    with np.errstate(over="ignore"):
        mask = values == number
    return mask.all(axis=2) if mask.ndim == 3 else mask


def values_by_tifffile(data: bytes, page: int = 0) -> Deep:
    """Return the values of a TIFF that Pillow does not support: packed 12 bits, 64 bits, float RGB, planes.

    Raises:
        ValueError: if tifffile (or imagecodecs, for the compression) is not installed, or the image is not grey or RGB.
        Image.DecompressionBombError: if there are too many pixels.
        Exception: whatever tifffile raises for corrupt files.
    """
    try:
        import tifffile
    except ImportError as e:
        raise ValueError(f"a kind of TIFF that Pillow cannot read; tifffile may: {install('tifffile')}") from e
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if (pages := len(file.pages)) > 1 and page >= pages:
            raise ValueError(f"data.page={page}, expected at most {pages - 1}, its last one")
        one = file.pages[page if pages > 1 else 0]
        samples, kind = int(one.samplesperpixel), int(one.photometric)
        if one.imagewidth * one.imagelength > 2 * (Image.MAX_IMAGE_PIXELS or sys.maxsize):
            raise Image.DecompressionBombError(f"{one.imagewidth * one.imagelength:,} pixels")
        if (kind, samples) not in ((WHITE_IS_ZERO, 1), (BLACK_IS_ZERO, 1), (RGB, 3), (RGB, 4)) or one.ndim > 3:
            raise ValueError(f"expected grey or RGB, got {samples} channels {one.axes} of type {one.dtype}")
        try:
            values = one.asarray(maxworkers=1)
        except (ValueError, NotImplementedError) as e:  # unsupported compressions, packed integers
            if "imagecodecs" in str(e):
                raise ValueError(f"decoding it needs the package imagecodecs: {install('imagecodecs')}") from e
            raise
        bits, tag = int(one.bitspersample), one.tags.get(NODATA)
    if values.ndim == 3:
        values = np.moveaxis(values, 0, -1) if int(one.planarconfig) == SEPARATE else values
        values = values[..., :3]
    if values.dtype.kind not in "uif" or values.dtype == np.int8:
        raise ValueError(f"expected numbers, got {values.dtype}")
    return declared(values, bits, None if tag is None else tag.value, white_is_zero=kind == WHITE_IS_ZERO)


def to_levels(deep: Deep, intensity: tuple[float, float] | None) -> np.ndarray:
    """Return uint8 levels of the same shape, mapping ``intensity`` linearly to 0..255 and clipping values outside.

    NaN and nodata become 0. Without ``intensity``, apply :func:`by_depth`.

    Raises:
        ValueError: if a float image has no finite value.
    """
    if deep.values.dtype.kind == "f" and not np.isfinite(deep.values).any():
        raise ValueError("no finite value")
    if deep.values.dtype == np.uint8 and deep.top == 255:
        return deep.values
    has_range = intensity is not None and deep.values.dtype.itemsize > 1  # ranges apply only above 8 bits
    levels = scaled(deep.values, *intensity) if has_range else by_depth(deep)
    if deep.nodata is not None:
        levels[deep.nodata] = 0
    return levels


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return uint8 levels, mapping ``low`` to 0 and ``high`` to 255."""
    if values.dtype == np.uint16:
        return _table(low, high)[values]
    return _scaled(values, low, high)


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    values = np.clip(values.astype(np.float64), low, high)
    return np.nan_to_num(np.round((values - low) * (255 / (high - low))), copy=False).astype(np.uint8)


@functools.lru_cache(maxsize=8)
def _table(low: float, high: float) -> np.ndarray:
    return _scaled(np.arange(65536), low, high)


def by_depth(deep: Deep) -> np.ndarray:
    """Return uint8 levels when the dataset's range is unknown.

    Depths up to 16 bits are scaled by the depth, floats in 0..1 and integers in 0..65535 by that range, and all other
    values by the minimum and maximum of the image.
    """
    values = deep.values
    if deep.top is not None:
        if deep.top > 255:
            warn_once(f"{deep.top.bit_length()} bits", "they are scaled by their depth")
        return scaled(values.astype(np.uint16), 0, deep.top)
    valid = deep.valid()
    if not len(valid):
        return np.zeros(values.shape, np.uint8)
    low, high = float(valid.min()), float(valid.max())
    top = 1 if values.dtype.kind == "f" else 65535
    if low >= 0 and high <= top:
        warn_once(str(values.dtype), f"values in 0..{top} are scaled to 0..255")
        low, high = 0, top
    else:
        warn_once(f"{values.dtype} beyond 0..{top}", "the least value becomes 0, the greatest 255, image by image")
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return _scaled(np.where(np.isfinite(values), values, low), low, high)


@functools.cache
def warn_once(kind: str, rule: str) -> None:
    """Log ``rule`` for a ``kind`` of values, once per process."""
    logger.warning(f"images of {kind} found: {rule}; data.intensity=[low, high] sets one range for all")
