"""ExtendedVisionDataset: the base of all datasets here, and of users' own ones as in upstream.

A subclass gives ``get_image_data(index) -> bytes``, ``get_target(index)`` and ``__len__``; a ``name(index)`` makes
errors and the list of bad images readable.
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
    """Images from bytes: (transformed image, transformed target) by index.

    Either ``transforms`` (a callable of image and target) or ``transform`` and ``target_transform``; without any the
    image is PIL, mode RGB. ``exif``: turn images as their EXIF orientation says. ``image_decoder_type``: what decodes
    the bytes, a :class:`DecoderType` or a subclass of :class:`Decoder`; it also gets ``image_decoder_params``.
    ``reading``, an attribute: which values become black and white in images of more than 8 bits, which page is read.
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
        """Return what to call image ``index`` in messages: its path, where it has one."""
        return f"{type(self).__name__}[{index}]"

    def shares(self) -> list[tuple[str, int, float]]:
        """Return (name, number of images, share of the draws) of the parts the dataset consists of, here one."""
        return [(f"{type(self).__name__} {self.root or ''}".strip(), len(self), 1.0)]

    def digest(self) -> str:
        """Return a hash of which images there are, "" where only their number is known."""
        return ""

    def left_out(self) -> Counter[str]:
        """Return how many files of which extension were found beside the images."""
        return Counter()

    def passed_over(self) -> list[PassedOver]:
        """Return the folders and files that could not be listed, or not to their end."""
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
