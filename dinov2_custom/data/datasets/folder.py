"""Datasets over folders: ImageDataset has no labels (training), LabelledFolder one folder per class (evaluation)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from dinov2_custom.data.listing import PassedOver, list_images, log_passed_over
from dinov2_custom.data.sources import EXTENSIONS, FolderSource, PathTable, Root, as_roots, read_file
from dinov2_custom.errors import DataError

from .extended import ExtendedVisionDataset
from .source_dataset import SourceDataset


class ImageDataset(SourceDataset):
    """All images below one or more folders, in sorted order and without labels; samples are (image, ()).

    Raises:
        DataError: if a folder is missing or there is no image.
    """

    def __init__(
        self,
        root: Root | Sequence[Root],
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        *,
        transforms: Callable | None = None,
        extensions: Sequence[str] = EXTENSIONS,
        exif: bool = False,
    ) -> None:
        source = FolderSource(root, extensions)
        super().__init__(source, transform, target_transform, root=root, transforms=transforms, exif=exif)


class LabelledFolder(ExtendedVisionDataset):
    """Images in one folder per class, nested to any depth; samples are (image, class index).

    ``classes`` is the sorted list of the folders directly below ``root`` that hold images; a class index is a position
    in that list.

    Raises:
        DataError: if the folder is missing or no class folder holds an image.
    """

    def __init__(
        self,
        root: Root,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        *,
        transforms: Callable | None = None,
        extensions: Sequence[str] = EXTENSIONS,
        exif: bool = False,
    ) -> None:
        super().__init__(root, transforms, transform, target_transform, exif=exif)
        folder = as_roots(root)[0]
        by_class: dict[str, list[str]] = {}
        loose = 0
        self._passed_over: list[PassedOver] = []
        for path in list_images([folder], extensions, self._passed_over):
            name, _, rest = os.path.relpath(path, folder).partition(os.sep)
            if rest:
                by_class.setdefault(name, []).append(path)
            else:
                loose += 1
        if not by_class:
            raise DataError(
                f"expected a folder for each class, got {loose} images right in {folder}; "
                "put every class's images into a folder of its own"
            )
        if loose:
            self._passed_over.append(PassedOver(folder, f"{loose} images right in it, outside the class folders"))
        log_passed_over(self._passed_over)
        self.classes = sorted(by_class)
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self.paths = PathTable(path for name in self.classes for path in by_class[name])
        sizes = [len(by_class[name]) for name in self.classes]
        self.targets = np.repeat(np.arange(len(self.classes), dtype=np.int64), sizes)

    def __len__(self) -> int:
        return len(self.paths)

    def passed_over(self) -> list[PassedOver]:
        return self._passed_over

    def name(self, index: int) -> str:
        return self.paths[index]

    def get_image_data(self, index: int) -> bytes:
        return read_file(self.paths[index])

    def get_target(self, index: int) -> int:
        return int(self.targets[index])

    def get_targets(self) -> np.ndarray:
        """Return the class index of every image, int64 (len,)."""
        return self.targets
