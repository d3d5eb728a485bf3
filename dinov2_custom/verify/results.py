"""Results for all images: on disk as they arrive (append-only, one line per image), and in arrays of 11 bytes each.

A line is reused in a later run if the image still has the same name and, if it is a file or part of one, the file has
the same size and modification time. A truncated line, left by a killed run, is ignored.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dinov2_custom.files import parse_json_object

from .check import Checked

UNKNOWN, SOUND, BAD = 0, 1, 2
FLUSH_EVERY_S = 0.5
PASSING = ("unreadable", "decoder died", "too slow")  # classes of reasons that may be transient

_ROW = {"i": 0, "path": "", **Checked()._asdict()}  # types of the fields of a line

Stamp = list[int] | None


def stamp_of(name: str) -> Stamp:
    """Return [size in bytes, mtime in ns] of the file that an image is or is part of, or None if there is none.

    Names of parts of files are ``<file>!<part>`` or ``<file>/<part>``.
    """
    place = name
    while place:
        try:
            status = os.stat(place)
            # reaching a folder means that the image's own file is missing
            return None if stat.S_ISDIR(status.st_mode) else [status.st_size, status.st_mtime_ns]
        except (OSError, ValueError):
            place = place[: max(place.rfind("!"), place.rfind("/"), place.rfind(os.sep), 0)]
    return None


class Results:
    """The results of all images of a dataset, by their number."""

    def __init__(self, path: Path, name: Callable[[int], str], count: int):
        self.path, self.name = path, name
        self.status = np.zeros(count, np.uint8)
        self.sizes = np.zeros((count, 2), np.int32)
        self.kind = np.zeros(count, np.uint16)
        self.kinds: list[tuple[str, str, str, str]] = [("", "", "", "")]
        self.reasons: dict[int, str] = {}
        self._kind_of = {self.kinds[0]: 0}
        self._file: Any = None
        self._flushed = 0.0

    def __enter__(self) -> Results:
        self._file = open(self.path, "a", encoding="utf-8", newline="\n")
        if _is_torn(self.path):
            self._file.write("\n")
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def todo(self) -> np.ndarray:
        """Return the numbers of the images without a result, int64, ascending."""
        return np.flatnonzero(self.status == UNKNOWN)

    def set(self, i: int, found: Checked) -> None:
        """Record the result of image ``i`` in memory."""
        kind = (found.format, found.mode, found.by, found.note)
        if kind not in self._kind_of:
            self._kind_of[kind] = len(self.kinds)
            self.kinds.append(kind)
        self.kind[i] = self._kind_of[kind]
        self.sizes[i] = (found.width, found.height)
        self.status[i] = BAD if found.reason else SOUND
        if found.reason:
            self.reasons[i] = found.reason

    def add(self, i: int, found: Checked, stamp: Stamp) -> None:
        """Record the result of image ``i`` in memory and on disk."""
        self.set(i, found)
        row = {"i": i, "path": self.name(i), "stamp": stamp, **found._asdict()}
        self._file.write(json.dumps(row) + "\n")
        now = time.monotonic()
        if now - self._flushed > FLUSH_EVERY_S:
            self._file.flush()
            self._flushed = now

    def take_over(self, has_simplejpeg: bool) -> int:
        """Load the results of earlier runs that are still valid into memory; return the number of images.

        Transient failures, and JPEG files checked with Pillow if simplejpeg is available now, are excluded.
        """
        moved: dict[str, dict] = {}
        count = len(self.status)
        for row in self._rows():
            i = row["i"]
            if row["reason"].split(":")[0] in PASSING or (has_simplejpeg and _by_pillow(row)):
                continue
            if 0 <= i < count and self.name(i) == row["path"]:
                self._take(i, row)
            else:
                moved[row["path"]] = row
        if moved:
            for i in self.todo().tolist():
                row = moved.get(self.name(i))
                if row is not None:
                    self._take(i, row)
        return int((self.status != UNKNOWN).sum())

    def _take(self, i: int, row: dict) -> None:
        if row["stamp"] == stamp_of(row["path"]):
            self.reasons.pop(i, None)
            self.set(i, Checked(**{key: row[key] for key in Checked._fields}))

    def _rows(self) -> Iterator[dict]:
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = parse_json_object(line)
                except ValueError:  # truncated line
                    continue
                if all(type(row.get(key)) is type(value) for key, value in _ROW.items()) and "stamp" in row:
                    yield row


def _is_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1 if path.stat().st_size else 0, os.SEEK_END)
        return file.read(1) not in (b"", b"\n")


def _by_pillow(row: dict) -> bool:
    return row["format"] == "JPEG" and row["by"] == "pillow"
