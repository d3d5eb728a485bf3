"""Upstream's decoder objects: something with ``decode()``. The rules for pixels are in ``data/decode.py``."""

from __future__ import annotations

from enum import Enum
from typing import Any

from PIL import Image

from dinov2_custom.data.decode import decode_rgb
from dinov2_custom.data.depth import Reading


class Decoder:
    """Holds encoded data; :meth:`decode` returns what it stands for."""

    def decode(self) -> Any:
        raise NotImplementedError


class ImageDataDecoder(Decoder):
    """Decodes the bytes of an image file into a PIL image of mode RGB; ``source`` names it in errors."""

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
    """The decoders of images by name. Upstream's others, of more channels than three, are not here."""

    ImageDataDecoder = "ImageDataDecoder"

    def get_class(self) -> type[Decoder]:
        return {DecoderType.ImageDataDecoder: ImageDataDecoder}[self]


class TargetDecoder(Decoder):
    """Returns the target as it is."""

    def __init__(self, target: Any):
        self._target = target

    def decode(self) -> Any:
        return self._target


class TupleDecoder(Decoder):
    """Decodes several things into a tuple."""

    def __init__(self, *decoders: Decoder):
        self._decoders = decoders

    def decode(self) -> tuple[Any, ...]:
        return tuple(decoder.decode() for decoder in self._decoders)
