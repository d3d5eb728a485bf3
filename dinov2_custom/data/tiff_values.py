"""The numbers of a TIFF as its tags declare them, where Pillow's reader leaves that to the caller.

Not the scaling to 8 bits (``decode``). Read :func:`as_declared`.

Source: TIFF 6.0, tags PhotometricInterpretation, SampleFormat and Compression.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

BITS, COMPRESSION, PHOTOMETRIC, SAMPLE_FORMAT = 258, 259, 262, 339
WHITE_IS_ZERO, UNSIGNED, SIGNED = 0, 1, 2


def signed_bytes(image: Image.Image) -> np.ndarray | None:
    """Return the values (H, W) of a loaded 8-bit grey image that declares them signed, which Pillow passes over."""
    tags = getattr(image, "tag_v2", None)
    if image.mode != "L" or tags is None or tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] != SIGNED:
        return None
    return np.asarray(image).view(np.int8)


def as_declared(image: Image.Image) -> np.ndarray:
    """Return the values (H, W) of a loaded grey image of mode I;16, I or F: as black-is-zero, unsigned where it is.

    Raises:
        ValueError: Pillow reads them in the wrong byte order.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return values
    if image.mode in ("I", "F") and tags.prefix == b"MM" and tags.get(COMPRESSION, 1) != 1:
        raise ValueError("compressed big-endian integers or floats, which Pillow reads wrongly; write it little-endian")
    if image.mode == "I" and tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED:
        values = values.view(np.uint32)
    if tags.get(PHOTOMETRIC) != WHITE_IS_ZERO:
        return values
    if image.mode == "F":
        return 1 - values  # in 0..1 or beyond it as before
    return np.iinfo(np.uint16 if image.mode.startswith("I;16") else values.dtype).max - values
