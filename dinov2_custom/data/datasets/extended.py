"""ExtendedVisionDataset, the base class of all datasets here and, as in upstream, of user-defined datasets.

A subclass defines ``get_image_data(index) -> bytes``, ``get_target(index)`` and ``__len__``; defining ``name(index)``
as well makes errors and the list of bad images readable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Dataset

from dinov2_custom.data.depth import Reading
from dinov2_custom.data.listing import PassedOver
from dinov2_custom.errors import DataError, UnreadableImageError, class_of_torchvision

from .decoders import Decoder, DecoderType, ImageDataDecoder, TargetDecoder


class SeparateTransforms:
    """Apply ``transform`` to the image and ``target_transform`` to the target; either may be None."""

    def __init__(self, transform: Callable | None, target_transform: Callable | None):
        self.transform = transform
        self.target_transform = target_transform

    def __call__(self, image: Any, target: Any) -> tuple[Any, Any]:
        image = image if self.transform is None else self.transform(image)
        return image, target if self.target_transform is None else self.target_transform(target)


class ExtendedVisionDataset(class_of_torchvision("datasets.vision", "VisionDataset", otherwise=Dataset)):
    """Return (transformed image, transformed target) by index, decoding images from bytes.

    Pass either ``transforms`` (a callable of image and target) or ``transform`` and ``target_transform``; without any,
    the image is a PIL image of mode RGB. ``exif``: rotate images according to their EXIF orientation.
    ``image_decoder_type``: a :class:`DecoderType` or a subclass of :class:`Decoder` for the bytes, constructed with
    ``image_decoder_params``. The attribute ``reading`` determines the black and white levels of images with more than
    8 bits and the page that is read.
    """

    reading = Reading()

    def __init__(
        self,
        root: Any = None,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        *,
        exif: bool = False,
        image_decoder_type: DecoderType | type[Decoder] = DecoderType.ImageDataDecoder,
        image_decoder_params: Mapping[str, Any] | None = None,
    ) -> None:
        if transforms is not None and (transform is not None or target_transform is not None):
            raise ValueError("expected either transforms or transform / target_transform, got both")
        self.root = root
        self.transform = transform
        self.target_transform = target_transform
        if transform is not None or target_transform is not None:
            transforms = SeparateTransforms(transform, target_transform)
        self.transforms = transforms
        self.exif = exif
        is_member = isinstance(image_decoder_type, DecoderType)
        self.image_decoder_class = image_decoder_type.get_class() if is_member else image_decoder_type
        self.image_decoder_params = dict(image_decoder_params or {})

    def get_image_data(self, index: int) -> bytes:
        raise NotImplementedError

    def get_target(self, index: int) -> Any:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the name of image ``index`` for messages: its path, if it has one."""
        return f"{type(self).__name__}[{index}]"

    def shares(self) -> list[tuple[str, int, float]]:
        """Return (name, number of images, share of the draws) of each part of the dataset; here there is one part."""
        return [(f"{type(self).__name__} {self.root or ''}".strip(), len(self), 1.0)]

    def digest(self) -> str:
        """Return a hash identifying the set of images, or "" if only their number is known."""
        return ""

    def left_out(self) -> Counter[str]:
        """Return the number of non-image files found, by extension."""
        return Counter()

    def passed_over(self) -> list[PassedOver]:
        """Return the folders and files that could not be listed completely."""
        return []

    def get_sample_decoder(self, index: int) -> Decoder:
        """Return the decoder of image ``index``."""
        params = self.image_decoder_params
        if self.image_decoder_class is ImageDataDecoder:
            params = {"source": self.name(index), "exif": self.exif, "reading": self.reading} | params
        return self.image_decoder_class(self.get_image_data(index), **params)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return (image, target).

        Raises:
            UnreadableImageError: the image cannot be read or decoded; the message names it.
        """
        try:
            image = self.get_sample_decoder(index).decode()
        except UnreadableImageError:
            raise
        except (DataError, OSError) as e:
            raise UnreadableImageError(str(e)) from e
        target = TargetDecoder(self.get_target(index)).decode()
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def __len__(self) -> int:
        raise NotImplementedError
