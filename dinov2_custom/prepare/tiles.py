"""Cut huge images into square tiles, one band of rows at a time; above Pillow's limit only TIFF, through tifffile.

The last tile of a row or column is shifted inwards, overlapping its neighbour, so that all have full size. An image
narrower than a tile gives tiles of its own width.
"""

from __future__ import annotations

import importlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from dinov2_custom.data.decode import READING, decode_rgb, note_of_page
from dinov2_custom.data.depth import NODATA, Deep, Reading, declared, to_levels
from dinov2_custom.errors import DataError, missing

from .change import Options, Output, encode, with_suffix

MINISWHITE, RGB, YCBCR = 0, 2, 6
JPEG = (6, 7)  # compressions whose decoder returns RGB


class Bands(Protocol):
    """An image read by rows: ``rows(top, bottom)`` returns uint8 (bottom - top, width, 3)."""

    width: int
    height: int
    format: str

    def rows(self, top: int, bottom: int) -> np.ndarray: ...

    def close(self) -> None: ...


def find_tifffile() -> ModuleType | None:
    """Return the module tifffile, or None if it is not installed."""
    try:
        return importlib.import_module("tifffile")
    except ImportError:
        return None


class DecodedBands:
    """Rows of an image that Pillow can decode in full."""

    def __init__(self, data: bytes, name: str, format: str, reading: Reading = READING):
        self._pixels = np.asarray(decode_rgb(data, name, reading=reading))
        self.height, self.width = self._pixels.shape[:2]
        self.format = format

    def rows(self, top: int, bottom: int) -> np.ndarray:
        return self._pixels[top:bottom]

    def close(self) -> None:
        pass


class TiffBands:
    """Rows of one page of a TIFF of any size, decoded strip by strip or tile by tile.

    Raises:
        DataError: if tifffile is missing or the kind of TIFF is unsupported; the message says what to do.
    """

    format = "TIFF"

    def __init__(self, file: str | BinaryIO, name: str, reading: Reading = READING):
        tifffile = find_tifffile()
        if tifffile is None:
            raise DataError(missing("tifffile", f"a huge TIFF, {name}"))
        try:
            self._tiff: Any = tifffile.TiffFile(file)
            pages = len(self._tiff.pages)
            self._page: Any = self._tiff.pages[min(reading.page, pages - 1)]
        except Exception as e:  # tifffile raises its own errors, struct.error, ValueError, ...
            raise DataError(
                f"expected a TIFF, the only format that can be read in parts: {name} ({type(e).__name__}: {e}); "
                "convert it to a tiled TIFF"
            ) from e
        if pages > 1 and reading.page >= pages:
            self.close()
            raise DataError(f"expected at most {pages - 1}, its last page, as --page, got {reading.page}: {name}")
        self.name, self.intensity = name, reading.intensity
        self.note = note_of_page(self._page.description, pages)
        page = self._page
        self.width, self.height = int(page.imagewidth), int(page.imagelength)
        self._samples = int(page.samplesperpixel)
        self._step = int(page.tilelength if page.is_tiled else min(page.rowsperstrip or self.height, self.height))
        across = -(-self.width // int(page.tilewidth)) if page.is_tiled else 1
        self._across = across
        wrong = self._unsupported()
        if wrong:
            self.close()
            raise DataError(f"expected a TIFF of grey or RGB: {name} ({wrong}); convert it")

    def _unsupported(self) -> str:
        page = self._page
        if page.dtype is None or page.dtype.kind not in "uif" or page.dtype == "int8":
            return f"values of type {page.dtype}"
        if self._samples not in (1, 3, 4) or (self._samples > 1 and int(page.planarconfig) != 1):
            return f"{self._samples} channels, planar configuration {int(page.planarconfig)}"
        if self._samples == 1 and int(page.photometric) not in (MINISWHITE, 1):
            return f"colours by {page.photometric!r}"
        if self._samples > 1 and int(page.photometric) not in (RGB, YCBCR):
            return f"colours by {page.photometric!r}"
        if int(page.photometric) == YCBCR and int(page.compression) not in JPEG:
            return f"YCbCr compressed by {page.compression!r}"
        return ""

    def rows(self, top: int, bottom: int) -> np.ndarray:
        values = self.values(top, bottom)
        if self.intensity is None and values.top is None:
            raise DataError(f"expected the range of {values.values.dtype}: {self.name}; give --intensity LOW HIGH")
        levels = to_levels(values, self.intensity)
        return np.repeat(levels[..., None], 3, axis=2) if levels.ndim == 2 else levels

    def values(self, top: int, bottom: int) -> Deep:
        """Return the values of rows, (bottom - top, width) or (bottom - top, width, 3)."""
        page = self._page
        band = np.zeros((bottom - top, self.width, self._samples), page.dtype)
        for row in range(top // self._step, -(-bottom // self._step)):
            for column in range(self._across):
                piece = self._piece(row * self._across + column)
                if piece is None:
                    continue
                y, x = row * self._step, column * (int(page.tilewidth) if page.is_tiled else 0)
                first, last = max(top, y), min(bottom, y + piece.shape[0])
                right = min(self.width, x + piece.shape[1])
                band[first - top : last - top, x:right] = piece[first - y : last - y, : right - x]
        tag = page.tags.get(NODATA)
        return declared(
            band[..., 0] if self._samples == 1 else band[..., :3],
            int(page.bitspersample),
            None if tag is None else tag.value,
            white_is_zero=int(page.photometric) == MINISWHITE,
        )

    def sample(self, bands: int = 8) -> Deep:
        """Return the values of some rows, spread over the page."""
        height = min(self._step, self.height, 64)
        tops = sorted({k * (self.height - height) // max(bands - 1, 1) for k in range(bands)})
        parts = [self.values(top, top + height) for top in tops]
        return Deep(np.concatenate([part.valid() for part in parts]))

    def _piece(self, number: int) -> np.ndarray | None:
        """Decode one strip or tile to (rows, columns, samples); return None if it was never written."""
        page, file = self._page, self._tiff.filehandle
        try:
            file.seek(page.dataoffsets[number])
            data = file.read(page.databytecounts[number])
            if not data:
                return None
            if len(data) < page.databytecounts[number]:
                raise DataError(f"damaged TIFF: cut off in part {number}: {self.name}")
            decoded = page.decode(data, number, jpegtables=page.jpegtables)[0]
        except DataError:
            raise
        except Exception as e:
            if "imagecodecs" in str(e):
                raise DataError(missing("imagecodecs", f"the compression of {self.name}")) from e
            raise DataError(f"damaged TIFF: part {number}: {type(e).__name__}: {e}: {self.name}") from e
        return None if decoded is None else decoded[0]

    def close(self) -> None:
        self._tiff.close()


def starts(length: int, tile: int) -> list[int]:
    """Return the start positions of the tiles along a side of ``length`` pixels."""
    return [0] if length <= tile else [*range(0, length - tile, tile), length - tile]


def cut(bands: Bands, name: str, options: Options) -> Iterator[Output]:
    """Yield the tiles of an image, row by row; their names end in _y<top>_x<left>."""
    lossy = options.format == "jpeg" or (options.format == "keep" and bands.format == "JPEG")
    format = "JPEG" if lossy else "PNG"
    stem, suffix = os.path.splitext(name)
    stem = stem if len(suffix) <= 5 else name
    for top in starts(bands.height, options.tile):
        rows = bands.rows(top, min(bands.height, top + options.tile))
        for left in starts(bands.width, options.tile):
            tile = Image.fromarray(np.ascontiguousarray(rows[:, left : left + options.tile]))
            data = encode(tile, 1, format, options.quality)
            yield Output(with_suffix(f"{stem}_y{top:06d}_x{left:06d}", format), data, *tile.size)


def write_tiles(bands: Bands, name: str, options: Options, spool: Path) -> int:
    """Write the tiles of an image into the tar file ``spool`` and return their number."""
    count = 0
    with tarfile.open(spool, "w", format=tarfile.PAX_FORMAT) as tar:
        for output in cut(bands, name, options):
            add_member(tar, output)
            count += 1
    return count


def read_tiles(spool: Path) -> Iterator[Output]:
    """Yield the outputs written by :func:`write_tiles`."""
    with tarfile.open(spool, "r:") as tar:
        for member in tar:
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            yield Output(member.name, data, *Image.open(io.BytesIO(data)).size)


def add_member(tar: tarfile.TarFile, output: Output) -> int:
    """Append a file to a tar reproducibly (without time stamps) and return the offset of its bytes."""
    info = tarfile.TarInfo(output.name)
    info.size = len(output.data)
    tar.addfile(info, io.BytesIO(output.data))
    return tar.offset - -(-len(output.data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
