"""ImageNet-1k in upstream's layout: ``root/{train,val}/<class id>/*.JPEG``, ``root/test/*.JPEG``, ``root/labels.txt``.

If the tables in ``extra/`` (``entries-TRAIN.npy`` ...) exist, they replace listing the folders.

Source of the layout: upstream data/datasets/image_net.py.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from enum import Enum
from functools import cached_property

import numpy as np

from dinov2_custom.data.listing import list_images
from dinov2_custom.data.sources import read_file
from dinov2_custom.errors import DataError

from .table_dataset import TableDataset

NO_CLASS = np.uint32(0xFFFFFFFF)


class Split(Enum):
    """Part of the dataset, with the naming scheme of its files."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @property
    def length(self) -> int:
        """Number of images in the complete split."""
        return {Split.TRAIN: 1_281_167, Split.VAL: 50_000, Split.TEST: 100_000}[self]

    def get_dirname(self, class_id: str | None = None) -> str:
        return self.value if class_id is None else os.path.join(self.value, class_id)

    def get_image_relpath(self, actual_index: int, class_id: str | None = None) -> str:
        """Return the path below the root of the image with this number (and class, except in the test split)."""
        if self is Split.TRAIN:
            basename = f"{class_id}_{actual_index}"
        else:
            basename = f"ILSVRC2012_{self.value}_{actual_index:08d}"
        return os.path.join(self.get_dirname(None if self is Split.TEST else class_id), basename + ".JPEG")

    def parse_image_relpath(self, image_relpath: str) -> tuple[str, int]:
        """Return (class id, number) of a path below the root; the class id is empty in the test split."""
        folder, filename = os.path.split(image_relpath)
        number = os.path.splitext(filename)[0].rpartition("_")[2]
        if not number.isdigit():
            raise DataError(
                f"expected names like {self.get_image_relpath(1, 'n01440764')}, got {image_relpath}; "
                "for other layouts use LabelledFolder:root=... or the plain folder"
            )
        return "" if self is Split.TEST else os.path.basename(folder), int(number)


class ImageNet(TableDataset):
    """ImageNet-1k; samples are (image, class index), with None as the target in the test split."""

    Split = Split

    def __init__(
        self,
        *,
        split: Split | str,
        root: str,
        extra: str | None = None,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        """Open ``split`` (TRAIN, VAL or TEST); ``extra`` is the optional folder of .npy tables (:meth:`dump_extra`).

        Raises:
            DataError: if the split's folder is missing or empty.
        """
        super().__init__(root, extra, transforms, transform, target_transform)
        self._split = split if isinstance(split, Split) else Split[split]
        if not len(self._entries):
            raise DataError(f"expected images, got an empty table: {self._table_path('entries')}; call dump_extra()")

    @property
    def split(self) -> Split:
        return self._split

    # tables

    def _table_path(self, kind: str) -> str:
        return os.path.join(self._extra_root or "", f"{kind}-{self.split.name}.npy")

    def _make_class_ids(self) -> np.ndarray:
        if self.split is Split.TEST:
            return np.empty(0, "U1")
        folder = os.path.join(self.root, self.split.get_dirname())
        return np.array(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))

    @cached_property
    def _class_names(self) -> np.ndarray:
        table = self._load_table("class-names")
        if table is not None:
            return table
        names = self._read_labels()
        return np.array([names.get(str(class_id), str(class_id)) for class_id in self._class_ids])

    def _read_labels(self) -> dict[str, str]:
        """Return class id -> name from root/labels.txt (comma-separated); empty if there is no such file."""
        path = os.path.join(self.root, "labels.txt")
        if not os.path.isfile(path):
            return {}
        with open(path, newline="", encoding="utf-8") as file:
            return {row[0]: row[1] for row in csv.reader(file) if len(row) >= 2}

    def _make_entries(self) -> np.ndarray:
        """Return actual_index and class_index of every image of the split, classes and images in sorted order."""
        paths = list_images([os.path.join(self.root, self.split.get_dirname())], (".jpeg",), self._passed_over)
        index_of = {str(class_id): i for i, class_id in enumerate(self._class_ids)}
        entries = np.empty(len(paths), dtype=[("actual_index", "<u4"), ("class_index", "<u4")])
        for i, path in enumerate(paths):
            class_id, actual_index = self.split.parse_image_relpath(os.path.relpath(path, self.root))
            entries[i] = (actual_index, index_of.get(class_id, NO_CLASS))
        return entries

    def dump_extra(self, split: Split | str | None = None, root: str | None = None) -> None:
        """List the split and write its tables into the ``extra`` folder; ``root`` overrides the folder of the images.

        ``split`` must be the dataset's own; it is accepted because earlier versions of upstream require it.
        """
        if split not in (None, self.split, self.split.name):
            raise DataError(f"expected the dataset's own split {self.split.name}, got {split}; open that split")
        if self._extra_root is None:
            raise DataError("expected an extra folder to write to; construct ImageNet with extra=<folder>")
        listed = ImageNet(split=self.split, root=root or self.root)
        ids, names = listed._class_ids, listed._class_names
        fields = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", ids.dtype), ("class_name", names.dtype)]
        entries = np.zeros(len(listed), dtype=fields)
        for field in ("actual_index", "class_index"):
            entries[field] = listed._entries[field]
        if self.split is not Split.TEST:
            entries["class_id"], entries["class_name"] = ids[entries["class_index"]], names[entries["class_index"]]
            self._save_tables(class_ids=ids, class_names=names)
        self._save_tables(entries=entries)

    # samples

    def find_class_name(self, class_index: int) -> str:
        return str(self._class_names[class_index])

    def name(self, index: int) -> str:
        relpath = self.split.get_image_relpath(int(self._entries[index]["actual_index"]), self.get_class_id(index))
        return os.path.join(self.root, relpath)

    def get_image_data(self, index: int) -> bytes:
        return read_file(self.name(index))

    def get_target(self, index: int) -> int | None:
        return None if self.split is Split.TEST else int(self._entries[index]["class_index"])

    def get_targets(self) -> np.ndarray | None:
        """Return the class index of every image (len,), or None for the test split."""
        return None if self.split is Split.TEST else self._entries["class_index"]

    def get_class_id(self, index: int) -> str | None:
        return None if self.split is Split.TEST else self.find_class_id(self._entries[index]["class_index"])

    def get_class_name(self, index: int) -> str | None:
        return None if self.split is Split.TEST else self.find_class_name(self._entries[index]["class_index"])
