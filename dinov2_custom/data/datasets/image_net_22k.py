"""ImageNet-22k in upstream's layout: ``root/<class id>.tar``, read in place by offset.

If ``extra/entries.npy`` and ``extra/class-ids.npy`` exist, the tars need not be scanned.

Source of the layout: upstream data/datasets/image_net_22k.py.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable

import numpy as np

from dinov2_custom.data.sources import OpenFiles
from dinov2_custom.data.tar_shards import walk_tar
from dinov2_custom.errors import DataError

from .table_dataset import TableDataset

HEADER = 512
GZIP_MAGIC = b"\x1f\x8b"
MAX_OPEN_TARS = 16


class ImageNet22k(TableDataset):
    """ImageNet-22k; samples are (image, class index).

    Raises:
        DataError: if ``root`` holds no tar file.
    """

    def __init__(
        self,
        *,
        root: str,
        extra: str | None = None,
        transforms: Callable | None = None,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
        mmap_cache_size: int = MAX_OPEN_TARS,
    ) -> None:
        super().__init__(root, extra, transforms, transform, target_transform)
        self._tars = OpenFiles(max(1, mmap_cache_size))
        if not len(self._entries):
            raise DataError(f"expected images in {os.path.join(self.root, '<class id>.tar')}, got none; check root=")

    # tables

    def _make_class_ids(self) -> np.ndarray:
        if not os.path.isdir(self.root):
            raise DataError(f"expected a folder of <class id>.tar, got {self.root} (missing); check root=")
        return np.array(sorted(name[:-4] for name in os.listdir(self.root) if name.endswith(".tar")))

    def _make_entries(self) -> np.ndarray:
        """Return class_index and [start_offset, end_offset), header included, of every image from the tar headers.

        Classes are in sorted order, images in the order of their tar.
        """
        rows: list[tuple[int, int, int, str]] = []
        for class_index, class_id in enumerate(self._class_ids):
            walk = walk_tar(self._tar_path(class_id))
            rows += [(class_index, m.offset - HEADER, m.offset + m.size, m.name) for m in walk.members]
            self._passed_over += walk.passed_over(lambda name: True)
        width = max((len(row[3]) for row in rows), default=1)
        fields = [("class_index", "<u4"), ("start_offset", "<u8"), ("end_offset", "<u8"), ("filename", f"U{width}")]
        return np.array(rows, dtype=fields)

    def dump_extra(self, root: str | None = None) -> None:
        """Scan the tars and write ``entries.npy`` and ``class-ids.npy``; ``root`` overrides the folder of the tars."""
        if self._extra_root is None:
            raise DataError("expected an extra folder to write to; construct ImageNet22k with extra=<folder>")
        walked = ImageNet22k(root=root or self.root)
        ids = walked._class_ids
        fields = [("class_index", "<u4"), ("class_id", ids.dtype), ("start_offset", "<u8"), ("end_offset", "<u8")]
        entries = np.empty(len(walked), dtype=[*fields, ("filename", walked._entries.dtype["filename"])])
        for field in ("class_index", "start_offset", "end_offset", "filename"):
            entries[field] = walked._entries[field]
        entries["class_id"] = ids[entries["class_index"]]
        self._save_tables(class_ids=ids, entries=entries)

    # samples

    def _tar_path(self, class_id: str) -> str:
        return os.path.join(self.root, f"{class_id}.tar")

    def name(self, index: int) -> str:
        """Return ``<tar>/<name in the tar>`` of image ``index``."""
        return f"{self._tar_path(self.get_class_id(index))}/{self._entries[index]['filename']}"

    def get_image_data(self, index: int) -> bytes:
        """Return the bytes of image ``index``, decompressed if the tar member is gzipped."""
        entry = self._entries[index]
        start, end = int(entry["start_offset"]) + HEADER, int(entry["end_offset"])
        try:
            data = self._tars.read(self._tar_path(self.find_class_id(entry["class_index"])), start, end - start)
            return gzip.decompress(data) if data[:2] == GZIP_MAGIC else data
        except (OSError, EOFError) as e:
            raise DataError(f"expected a readable image: {self.name(index)} ({e})") from e

    def get_target(self, index: int) -> int:
        return int(self._entries[index]["class_index"])

    def get_targets(self) -> np.ndarray:
        """Return the class index of every image (len,)."""
        return self._entries["class_index"]

    def get_class_id(self, index: int) -> str:
        return self.find_class_id(self._entries[index]["class_index"])

    def get_class_ids(self) -> np.ndarray:
        """Return the class id of every image (len,)."""
        return self._class_ids[self._entries["class_index"]]
