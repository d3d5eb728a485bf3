"""Images named by a list file: ``.txt`` with a path a line, or ``.csv`` with a column of paths.

In a ``.txt``, blank lines and lines that begin with ``#`` are no paths; ``./#x.png`` is one.
Paths are relative to the list's own folder, or to ``root``. No file of the list is looked for before it is drawn: one
that is missing is an unreadable image like any other. Lines may name images in tar and Parquet files, see
``list_members``. Read :class:`ListSource` first.
"""

from __future__ import annotations

import csv
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

from dinov2_custom.errors import DataError

from .index import CACHE_FROM, PathTable, cached, pack_stamps, pack_texts
from .list_members import MemberReader, Wanted, find_members, split_member
from .listing import Progress
from .parquet import ParquetSource
from .sources import Root, Source, as_roots, read_file, real

CHUNK = 4096
COLUMNS = ("path", "image", "file", "filename", "file_name", "filepath", "image_path")


class ListSource(Source):
    """The files that a list file names, in its order.

    ``column``: of a .csv file, whose columns have ``,``, ``;`` or tabs between them; may be left out where there is one
    column, or one of :data:`COLUMNS`. ``root``: folder that the paths are relative to, instead of the list's own.

    Raises:
        DataError: the list is missing, empty or has no such column.
    """

    def __init__(
        self, path: Root, column: str | None = None, root: Root | None = None, *, cache_from: int = CACHE_FROM
    ):
        self.path = os.path.abspath(as_roots(path)[0])
        self.root = os.path.dirname(self.path) if root is None else as_roots(root)[0]
        key = ["list, comments skipped", self.path, real(self.path), column or "", self.root]
        self.index = cached(key, lambda on_count: self._pack(column, on_count), cache_from)
        self.paths = PathTable(index=self.index)
        self.members = MemberReader(self.index, ParquetSource)

    def _pack(self, column: str | None, on_count) -> dict:
        try:
            started, status = time.time_ns(), os.stat(self.path)
            with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                rows = self._column(file, column) if self.path.lower().endswith(".csv") else _lines(file)
                wanted: Wanted = {}
                packed = pack_texts(self._chunks(rows, on_count, wanted), "path")
        except OSError as e:
            raise DataError(f"expected a list file: {self.path} ({type(e).__name__}: {e.strerror})") from e
        except csv.Error as e:
            raise DataError(f"expected a readable .csv file: {self.path} ({e})") from e
        if not len(packed["path_ends"]):
            raise DataError(f"expected paths of images, got an empty list: {self.path}")
        places = [self.path, *wanted]
        stats = [status, *(os.stat(place) if os.path.exists(place) else None for place in wanted)]
        members = find_members(wanted, len(packed["path_ends"]))
        return {**packed, **members, **pack_stamps(places, stats, started)}

    def _chunks(self, rows: Iterable[str], on_count, wanted: Wanted) -> Iterator[list[str]]:
        """Yield absolute paths; put those that are in another file into ``wanted``, with their numbers."""
        progress = Progress("reading the list", "files")
        while some := list(itertools.islice(rows, CHUNK)):
            paths = [os.path.join(self.root, os.path.expanduser(row)) for row in some]
            for number, path in enumerate(paths, start=progress.count):
                if "!" in path and (found := split_member(path)):
                    lines, names = wanted.setdefault(found[0], ([], []))
                    lines.append(number)
                    names.append(found[1])
            yield paths
            progress.add(len(some))
            on_count(progress.count)
        progress.end()

    def _column(self, file: TextIO, column: str | None) -> Iterator[str]:
        first = file.readline()
        between = next((mark for mark in ",;\t" if mark in first), ",")
        table = csv.reader(itertools.chain([first], file), delimiter=between)
        header = [name.strip() for name in next(table, [])]
        number = self._column_number(header, column)
        return (row[number].strip() for row in table if len(row) > number and row[number].strip())

    def _column_number(self, header: list[str], column: str | None) -> int:
        if column is None:
            usual = [name for name in header if name.lower() in COLUMNS]
            column = header[0] if len(header) == 1 else usual[0] if len(usual) == 1 else None
        if column not in header:
            got = ", ".join(header) or "an empty file"
            wanted = "one column named with column=" if column is None else f"a column {column!r}"
            raise DataError(f"expected {wanted} in the first line of {self.path}, got {got}")
        return header.index(column)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.paths[i]

    def read(self, i: int) -> bytes:
        return self.members.read(i, self.name(i)) if self.members.is_member(i) else read_file(self.paths[i])

    def parts(self) -> list[tuple[str, int]]:
        return [(self.path, len(self))]


def _lines(file: TextIO) -> Iterator[str]:
    return (line for line in (raw.rstrip("\r\n") for raw in file) if line.strip() and not line.lstrip().startswith("#"))
