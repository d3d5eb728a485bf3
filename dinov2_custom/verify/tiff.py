"""Find damage in compressed TIFF files that libtiff ignores: Deflate checksums and JPEG errors.

Other compressions have no checksum, and libtiff reports their syntax errors.

Source: TIFF 6.0; Adobe Photoshop TIFF technical notes (compressions 7 and 8).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from types import ModuleType

from PIL import Image

from dinov2_custom.data.decode import has_dct

from .structure import fault

COMPRESSION, TABLES = 259, 347
PLACES = ((273, 279), (324, 325))  # tags of the offsets and lengths of strips, tiles
JPEG, DEFLATE = 7, (8, 32946)


def tiff_fault(data: bytes, image: Image.Image, simplejpeg: ModuleType | None) -> str:
    """Return the fault in the compressed parts of a TIFF's current page, or "" (also for other formats)."""
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return ""
    compression = tags.get(COMPRESSION)
    for number, part in enumerate(_parts(data, tags)):
        found = ""
        if compression in DEFLATE:
            found = deflate_fault(part)
        elif compression == JPEG:
            tables = tags.get(TABLES, b"")
            found = _jpeg_fault(tables[:-2] + part[2:] if tables else part, simplejpeg)
        if found:
            return f"part {number}: {found}"
    return ""


def read_coefficients(data: bytes, simplejpeg: ModuleType) -> None:
    """Decode all coefficients of all components of a JPEG, computing no more pixels than that needs.

    Raises:
        ValueError: if libjpeg-turbo reports an error or a warning (its message), or "unsupported" for a file without
            coefficients.
    """
    if not has_dct(data):
        raise ValueError("unsupported JPEG process: no 8-bit DCT coefficients")
    space = simplejpeg.decode_jpeg_header(data)[2]
    space = "CMYK" if space in ("CMYK", "YCCK") else "GRAY"
    # at an eighth of the size the Huffman decoder still visits every coefficient; the rest is skipped
    simplejpeg.decode_jpeg(data, colorspace=space, min_height=1, min_width=1, min_factor=8)


def _parts(data: bytes, tags: Image.Exif | dict) -> Iterator[bytes]:
    for offsets, lengths in PLACES:
        for offset, length in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False):
            if length:
                yield data[offset : offset + length]


def deflate_fault(part: bytes) -> str:
    stream = zlib.decompressobj()
    try:
        while part and not stream.eof:  # in pieces, because a few bytes can expand to gigabytes
            stream.decompress(part, 1 << 20)
            part = stream.unconsumed_tail
    except zlib.error as e:
        return str(e)
    return ""


def _jpeg_fault(part: bytes, simplejpeg: ModuleType | None) -> str:
    if simplejpeg is None:
        return fault(part, "JPEG")
    try:
        read_coefficients(part, simplejpeg)
    except ValueError as e:
        return str(e) if "nsupported" not in str(e) else ""
    return ""
