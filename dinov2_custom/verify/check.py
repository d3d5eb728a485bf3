"""Check the bytes of one image file by decoding all of it; return the reason if it is damaged.

If simplejpeg is installed, JPEG data are entropy-decoded to the last bit by libjpeg-turbo, because Pillow hides
libjpeg's warnings; no more pixels are computed than that needs. Without simplejpeg, Pillow decodes the file in full and
``structure`` checks the syntax, which finds less (``docs/verify.md`` has the measured rates). For all other formats,
Pillow decodes every frame, and ``structure`` is applied as well. ``data.decode`` can decode every file that passes.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import NamedTuple

from PIL import Image

from dinov2_custom.data.decode import describe, loaded, open_image, open_page, page_note, to_rgb
from dinov2_custom.data.depth import Deep, is_deep
from dinov2_custom.errors import command

from .structure import ZERO_RUN, fault
from .tiff import read_coefficients, tiff_fault

PLAIN_MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr")  # conversion to RGB cannot fail
HEADER_QUIRKS = ("Invalid SOS parameters", "Unknown Adobe color transform", "unknown JFIF revision")
ABOUT_METADATA = ("EXIF", "Metadata", "Palette images with Transparency", "APNG contains")


class Checked(NamedTuple):
    """Result of checking one image file.

    ``reason`` is "class: details", or "" for a sound file; ``note``: see ``decode.page_note``.
    """

    reason: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    frames: int = 1
    by: str = "pillow"
    note: str = ""


def check_image(data: bytes, simplejpeg: ModuleType | None = None) -> Checked:
    """Check the bytes of an image file.

    Args:
        simplejpeg: the module returned by ``decode.find_simplejpeg``; None checks JPEG with Pillow.

    Raises:
        MemoryError: if memory runs out, which is no fault of the image.
    """
    if not data:
        return Checked("empty: the file has no bytes")
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            image = open_page(data)
        except Image.DecompressionBombError as e:
            return Checked(too_large(str(e)))
        except MemoryError:
            raise
        except Exception as e:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on broken files
            return Checked(f"not an image: {describe(data)} ({_text(e)})")
        if isinstance(image, Deep):  # sound, because all its values have been read
            height, width, *colours = image.values.shape
            mode = f"{image.values.dtype}{' RGB' * len(colours)}"
            return Checked("", "TIFF", mode, width, height, by="tifffile")
        seen = Checked("", image.format or "", image.mode, *image.size)
        seen = seen._replace(format="JPEG" if seen.format == "MPO" else seen.format)
        if is_deep(image) and image.mode in ("RGB", "RGBA"):  # Pillow reduces these to 8 bits
            seen = seen._replace(mode=f"{image.mode};16")
        if seen.format == "JPEG" and simplejpeg is not None:
            return _check_jpeg(data, seen, simplejpeg)
        return _check_with_pillow(image, data, seen, raised, simplejpeg)


def has_deep_mode(mode: str) -> bool:
    """Return whether images of ``Checked.mode`` have more than 8 bits a channel."""
    return ";16" in mode or mode in ("I", "F") or (mode.startswith(("uint", "int", "float")) and "uint8" not in mode)


def _check_with_pillow(
    image: Image.Image, data: bytes, seen: Checked, raised: list, simplejpeg: ModuleType | None = None
) -> Checked:
    found = fault(data, seen.format)
    if found:
        return seen._replace(reason=f"damaged {seen.format}: {found}")
    frame, frames = 0, 1
    try:
        seen = seen._replace(note=page_note(image))
        frames = 1 if seen.format == "JPEG" else getattr(image, "n_frames", 1)
        for frame in range(frames):
            if frame:
                image.seek(frame)
            image = loaded(image, data)
            found = found or tiff_fault(data, image, simplejpeg)
            if frame == 0 and image.mode not in PLAIN_MODES:
                to_rgb(image, data)  # does not modify an image of this mode
    except MemoryError:
        raise
    except Exception as e:
        where = f" (frame {frame + 1} of {frames})" if frames > 1 else ""
        return seen._replace(reason=f"damaged {seen.format}: {_text(e)}{where}", frames=frames)
    if found:
        return seen._replace(reason=f"damaged {seen.format}: {found}", frames=frames)
    told = [str(w.message) for w in raised if not issubclass(w.category, Image.DecompressionBombWarning)]
    told = [text for text in told if not any(known in text for known in ABOUT_METADATA)]
    return seen._replace(reason=f"damaged {seen.format}: {told[0]}" if told else "", frames=frames)


def _check_jpeg(data: bytes, seen: Checked, simplejpeg: ModuleType) -> Checked:
    """Read all coefficients of all components with libjpeg-turbo; any warning is a fault."""
    seen = seen._replace(by="simplejpeg")
    try:
        read_coefficients(data, simplejpeg)
    except ValueError as e:
        text = str(e).removeprefix("Corrupt JPEG data: ")
        quirk = any(known in text for known in HEADER_QUIRKS)
        return _rejected_jpeg(data, seen, "" if quirk else text)
    # the only damage observed with valid syntax; checked only if there is such a run of zeros
    found = fault(data, "JPEG") if bytes(ZERO_RUN) in data else ""
    return seen._replace(reason=f"damaged JPEG: {found}" if found else "")


def _rejected_jpeg(data: bytes, seen: Checked, text: str) -> Checked:
    """Return the reason for a JPEG that simplejpeg rejects; a kind that only simplejpeg lacks is checked by Pillow.

    ``text``: libjpeg's message, or "" if it does not concern the pixels.
    """
    try:
        with open_image(data) as image:
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always")
                by_pillow = _check_with_pillow(image, data, seen, raised)
    except MemoryError:
        raise
    except Exception as e:
        return seen._replace(reason=f"damaged JPEG: {_text(e)}")
    if by_pillow.reason:
        return by_pillow
    if not text or "nsupported" in text or "precision" in text.lower():
        return by_pillow._replace(by="pillow")
    return seen._replace(reason=f"damaged JPEG: {text} (other decoders silently return wrong pixels)")


def too_large(how: str) -> str:
    """Return the reason for a too large image, with its size (``how``) and what to do about it."""
    return f"too large: {how}; cut it into tiles ({command('run/data/prepare.py')} --tile)"


def _text(e: Exception) -> str:
    """Return the exception's first line without the buffer address that Pillow includes."""
    text = str(e).split(" <_io.BytesIO", 1)[0].split("\n", 1)[0]
    return f"{type(e).__name__}: {text}" if text else type(e).__name__
