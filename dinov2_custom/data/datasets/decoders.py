"""Upstream's decoder classes, each with a ``decode()`` method. The rules for pixels are in ``data/decode.py``."""

from __future__ import annotations

from enum import Enum
from typing import Any

from PIL import Image

from dinov2_custom.data.decode import decode_rgb
from dinov2_custom.data.depth import Reading


class Decoder:
    """Hold encoded data; :meth:`decode` returns the decoded object."""

    def decode(self) -> Any:
        raise NotImplementedError


class ImageDataDecoder(Decoder):
    """Decode the bytes of an image file into a PIL image of mode RGB; errors name the image by ``source``."""

    def __init__(
        self, image_data: bytes, source: str = "image", exif: bool = False, reading: Reading | None = None
    ):
        self._image_data = image_data
        self._source = source
        self._exif = exif
        self._reading = reading or Reading()

    def decode(self) -> Image.Image:
        return decode_rgb(self._image_data, self._source, exif=self._exif, reading=self._reading)


class DecoderType(Enum):
    """The image decoders by name. Upstream's decoders for more than three channels are not included."""

    ImageDataDecoder = "ImageDataDecoder"

    def get_class(self) -> type[Decoder]:
        return {DecoderType.ImageDataDecoder: ImageDataDecoder}[self]


class TargetDecoder(Decoder):
    """Return the target unchanged."""

    def __init__(self, target: Any):
        self._target = target

    def decode(self) -> Any:
        return self._target


class TupleDecoder(Decoder):
    """Apply several decoders and return their results as a tuple."""

    def __init__(self, *decoders: Decoder):
        self._decoders = decoders

    def decode(self) -> tuple[Any, ...]:
        return tuple(decoder.decode() for decoder in self._decoders)
