"""SourceDataset: the unlabeled images of any :class:`~dinov2_custom.data.sources.Source`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

from dinov2_custom.data.listing import PassedOver, log_passed_over
from dinov2_custom.data.sources import Source

from .extended import ExtendedVisionDataset

MAX_PARTS = 32


class SourceDataset(ExtendedVisionDataset):
    """All images of ``source``, in its order; samples are (image, ())."""

    def __init__(
        self,
        source: Source,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        *,
        root: object = None,
        transforms: Callable | None = None,
        exif: bool = False,
    ) -> None:
        super().__init__(root, transforms, transform, target_transform, exif=exif)
        self.source = source
        log_passed_over(source.passed_over())

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> bytes:
        return self.source.read(index)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def get_image_data(self, index: int) -> bytes:
        return self.source.read(index)

    def get_target(self, index: int) -> tuple[()]:
        return ()

    def digest(self) -> str:
        return self.source.digest()

    def left_out(self) -> Counter[str]:
        return self.source.left_out()

    def passed_over(self) -> list[PassedOver]:
        return self.source.passed_over()

    def shares(self) -> list[tuple[str, int, float]]:
        """Return (name, number of images, share of the draws) of each folder or file, in the order of the images."""
        parts = self.source.parts()
        if len(parts) > MAX_PARTS:
            parts = [(f"{os.path.dirname(parts[0][0])} ({len(parts)} files or folders)", len(self))]
        return [(name, number, number / len(self)) for name, number in parts]
