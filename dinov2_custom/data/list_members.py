"""Lines of a list file that name an image in another file: ``<x.tar>!<member>``, ``<x.parquet>!<row>``.

These are the names that sources of such files give their images, so that a list written from them can be trained on.
Read :func:`find_members`, then :class:`MemberReader`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dinov2_custom.errors import DataError

from .index import Index, PathTable, pack_texts
from .listing import PatientMap, log_passed_over
from .sources import OpenFiles
from .tar_shards import MAX_OPEN, TAR_SUFFIXES, walk_tar

logger = logging.getLogger("dinov2")
ROW_SUFFIXES = (".parquet", ".arrow")

Wanted = dict[str, tuple[list[int], list[str]]]


def split_member(path: str) -> tuple[str, str] | None:
    """Return (file, member or row) of such a name; None: it is the path of a file."""
    position = path.find("!")
    while position >= 0:
        container, member = path[:position], path[position + 1 :]
        if container.lower().endswith(TAR_SUFFIXES) or (
            container.lower().endswith(ROW_SUFFIXES) and member.isdecimal()
        ):
            return container, member
        position = path.find("!", position + 1)
    return None


def find_members(wanted: Wanted, number: int) -> dict[str, np.ndarray]:
    """Return index arrays of ``number`` lines: container (-1: a plain file), offset (-1: not there) and size.

    ``wanted``: for each container the lines that name something in it, and what. In a Parquet file the offset is the
    row. Containers that cannot be read are logged; their lines are unreadable images.
    """
    if not wanted:
        return {"container": np.empty(0, np.int32), **pack_texts([], "container")}
    container = np.full(number, -1, np.int32)
    offset, size = np.full(number, -1, np.int64), np.zeros(number, np.int64)
    for place, (file, known) in enumerate(zip(wanted, PatientMap(probes=4).map(_members, wanted), strict=True)):
        lines, names = wanted[file]
        container[lines] = place
        if known is None:
            offset[lines] = [int(name) for name in names]
            continue
        for line, name in zip(lines, names, strict=True):
            offset[line], size[line] = known.get(name, (-1, 0))
    return {"container": container, "offset": offset, "size": size, **pack_texts([list(wanted)], "container")}


def _members(file: str) -> dict[str, tuple[int, int]] | None:
    """Return name -> (offset, size) of a tar; None: a file of rows."""
    if not file.lower().endswith(TAR_SUFFIXES):
        return None
    try:
        walk = walk_tar(file)
        log_passed_over(walk.passed_over(lambda name: False))
        return {member.name: (member.offset, member.size) for member in walk.members}
    except DataError as e:
        logger.warning(str(e))
        return {}


class MemberReader:
    """Reads lines by the arrays of :func:`find_members`; ``open_rows`` makes a source of Parquet files."""

    def __init__(self, index: Index, open_rows: Callable[[Sequence[str]], Any]):
        self.index = index
        self.containers = PathTable(index=index, name="container")
        self._open_rows = open_rows
        self._rows: Any = None
        self._first: dict[str, tuple[int, int]] = {}
        self._tars = OpenFiles(MAX_OPEN)

    def is_member(self, line: int) -> bool:
        return len(self.index["container"]) > 0 and int(self.index["container"][line]) >= 0

    def read(self, line: int, name: str) -> bytes:
        """Return the bytes of the image that ``line`` names.

        Raises:
            DataError: its file or the image in it is not there, or cannot be read.
        """
        file = self.containers[int(self.index["container"][line])]
        offset, size = int(self.index["offset"][line]), int(self.index["size"][line])
        if not file.lower().endswith(TAR_SUFFIXES):
            return self._read_row(file, offset, name)
        if offset < 0:
            raise DataError(f"expected an image in a tar file, got nothing of that name: {name}")
        return self._tars.read_all(file, offset, size, name)

    def _read_row(self, file: str, row: int, name: str) -> bytes:
        if self._rows is None:
            files = [one for one in self.containers if one.lower().endswith(ROW_SUFFIXES) and os.path.isfile(one)]
            rows = self._open_rows(files or [file])
            numbers = [number for _, number in rows.parts()]
            starts = np.cumsum([0, *numbers])[:-1].tolist()
            self._first = dict(zip(files, zip(starts, numbers, strict=True), strict=True))
            self._rows = rows
        first, number = self._first.get(file, (0, 0))
        if row >= number:
            raise DataError(f"expected a row below {number}, the number in {file}: {name}")
        return self._rows.read(first + row)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}
