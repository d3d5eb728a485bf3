"""Images listed in a file: ``.txt`` with one path per line, or ``.csv``, ``.tsv`` or ``.jsonl`` with a column of paths.

In a ``.txt`` file, blank lines and lines that begin with ``#`` are ignored (write ``./#x.png`` for such a path).
Quotes around a path and trailing blanks or labels (``a.jpg 3``) are removed; in a path without slashes, backslashes
separate folders. The encoding is UTF-8, or UTF-16 with a byte order mark. A table may lack a header if exactly one
column has image paths.
Paths are relative to the list's own folder, or to ``root``. Files are not checked for existence in advance: a missing
file is an unreadable image like any other.

A line may name an image inside another file: ``<x.tar>!<member>``, ``<x.parquet>!<row>``. The sources of such files
name their images in this way, so that a list of these names can be used for training.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
import re
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from dinov2_custom.errors import DataError
from dinov2_custom.files import parse_json

from .index import CACHE_FROM, Index, PathTable, cached, pack_stamps, pack_texts
from .listing import EXTENSIONS, PassedOver, PatientMap, Progress, log_passed_over
from .parquet import ParquetSource
from .sources import OpenFiles, PathSource, Root, as_roots, pack_passed_over, real
from .tar_shards import MAX_OPEN, TAR_SUFFIXES, walk_tar

logger = logging.getLogger("dinov2")
CHUNK = 4096
JSON_SUFFIXES = (".jsonl", ".ndjson")
# a path with an image extension, then a blank, comma or semicolon, then a word without one
_ENDINGS = "|".join(map(re.escape, EXTENSIONS))
_LABELLED = re.compile(rf"(.+(?:{_ENDINGS})[\"']?)[ \t,;]+(?!.*(?:{_ENDINGS})$)\S.*", re.IGNORECASE)
COLUMNS = ("path", "image", "file", "filename", "file_name", "filepath", "image_path")
ROW_SUFFIXES = (".parquet", ".arrow")
Wanted = dict[str, tuple[list[int], list[str]]]


class ListSource(PathSource):
    """The files named in a list file, in its order.

    ``column``: the column of a .csv or .tsv file (delimited by ``,``, ``;`` or tabs), or the key in the objects of a
    .jsonl file; optional if there is only one column or one of :data:`COLUMNS`. ``root``: the folder to which paths are
    relative, instead of the list's own.

    Raises:
        DataError: if the list is missing, empty or has no such column.
    """

    def __init__(
        self, path: Root, column: str | None = None, root: Root | None = None, *, cache_from: int = CACHE_FROM
    ):
        self.path = os.path.abspath(as_roots(path)[0])
        self.root = os.path.dirname(self.path) if root is None else as_roots(root)[0]
        key = ["list, passed over", self.path, real(self.path), column or "", self.root]
        self.index = cached(key, lambda on_count: self._pack(column, on_count), cache_from)
        self.paths = PathTable(index=self.index)
        self.members = MemberReader(self.index, ParquetSource)

    def _pack(self, column: str | None, on_count) -> dict:
        try:
            started, status = time.time_ns(), os.stat(self.path)
            with open(self.path, encoding=_encoding(self.path), errors="surrogateescape", newline="") as file:
                suffix = os.path.splitext(self.path)[1].lower()
                short = array("Q")
                if suffix in (".csv", ".tsv"):
                    rows = self._column(file, column, short)
                else:
                    rows = self._objects(file, column) if suffix in JSON_SUFFIXES else self._lines(file)
                wanted: Wanted = {}
                packed = pack_texts(self._chunks(rows, on_count, wanted), "path")
        except OSError as e:
            raise DataError(f"expected a list file, got {e.strerror}: {self.path}; check the path") from e
        except (csv.Error, UnicodeError) as e:
            raise DataError(f"expected a readable list: {self.path} ({e})") from e
        if not len(packed["path_ends"]):
            raise DataError(f"expected paths of images, got an empty list: {self.path}; write one path per line")
        places = [self.path, *wanted]
        stats = [status, *(os.stat(place) if os.path.exists(place) else None for place in wanted)]
        members = find_members(wanted, len(packed["path_ends"]))
        reason = f"{len(short):,} lines without a path, the first is line {short[0]}" if short else ""
        passed_over = pack_passed_over([PassedOver(self.path, reason)] if short else [])
        return {**packed, **members, **passed_over, **pack_stamps(places, stats, started)}

    def _chunks(self, rows: Iterable[str], on_count, wanted: Wanted) -> Iterator[list[str]]:
        """Yield absolute paths; add those inside another file to ``wanted`` with their line numbers."""
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

    def _column(self, file: TextIO, column: str | None, short: array) -> Iterator[str]:
        """Return the paths in a table's column; append to ``short`` the numbers of the lines that lack this column."""
        first = file.readline()
        marks = "\t" if self.path.lower().endswith(".tsv") else ",;\t"
        between = next((mark for mark in marks if mark in first), ",")
        table = csv.reader(itertools.chain([first], file), delimiter=between)
        header = [name.strip() for name in next(table, [])]
        images = [number for number, cell in enumerate(header) if cell.lower().endswith(EXTENSIONS)]
        if column is None and len(images) == 1:
            logger.info(f"list without a header: {self.path}, column {images[0] + 1} has the paths")
            number, rows = images[0], itertools.chain([header], table)
        else:
            number, rows = self._column_number(header, column), table

        def paths() -> Iterator[str]:
            for row in rows:
                if len(row) > number and row[number].strip():
                    yield _clean(row[number])
                elif any(map(str.strip, row)):
                    short.append(table.line_num)

        return paths()

    def _objects(self, file: TextIO, column: str | None) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, finite=False)  # other columns may hold NaN, which Python's json writes
            except ValueError as e:
                raise DataError(f"expected a JSON object per line: {self.path} line {number} ({e})") from e
            if number == 1 and isinstance(row, dict):
                column = list(row)[self._column_number(list(row), column)]
            path = row.get(column) if isinstance(row, dict) else row
            if not isinstance(path, str):
                raise DataError(f"expected a path, got {path!r:.100}: {self.path} line {number}")
            yield path

    def _lines(self, file: TextIO) -> Iterator[str]:
        said: set[str] = set()
        for number, raw in enumerate(file, start=1):
            line = _clean(raw)
            if not line or raw.lstrip().startswith("#"):
                continue
            if (labelled := _LABELLED.fullmatch(line)) and "!" not in line:
                self._note(said, "labels after the paths are ignored", number)
                line = _clean(labelled[1])
            if "\\" in line and "/" not in line and os.sep == "/":
                self._note(said, "backslashes are read as slashes", number)
                line = line.replace("\\", "/")
            yield line

    def _note(self, said: set[str], what: str, number: int) -> None:
        if what not in said:
            said.add(what)
            logger.info(f"list {self.path}, from line {number}: {what}")

    def _column_number(self, header: list[str], column: str | None) -> int:
        if column is None:
            usual = [name for name in header if name.lower() in COLUMNS]
            column = header[0] if len(header) == 1 else usual[0] if len(usual) == 1 else None
        if column not in header:
            got = ", ".join(header) or "an empty file"
            wanted = "one column named with column=" if column is None else f"a column {column!r}"
            raise DataError(f"expected {wanted} in the first line of {self.path}, got {got}")
        return header.index(column)

    def read(self, i: int) -> bytes:
        return self.members.read(i, self.name(i)) if self.members.is_member(i) else super().read(i)

    def parts(self) -> list[tuple[str, int]]:
        return [(self.path, len(self))]


def _encoding(path: str) -> str:
    """Return the encoding of a text file, determined from its first bytes."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if b"\0" in start:
        raise DataError(f"expected a list in UTF-8, got zero bytes: {path}; save it as UTF-8 text")
    return "utf-8-sig"


def _clean(line: str) -> str:
    """Strip surrounding blanks and quotes from a path."""
    line = line.strip()
    if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'":
        line = line[1:-1]
    return line


def split_member(path: str) -> tuple[str, str] | None:
    """Return (file, member or row) of a name with ``!``, or None for the path of a file."""
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
    """Return index arrays of ``number`` lines: container (-1: a plain file), offset (-1: not found) and size.

    ``wanted``: for each container, the lines that refer to it and the members they name. For a Parquet file the offset
    is the row. Unreadable containers are logged, and their lines become unreadable images.
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
    """Return name -> (offset, size) of a tar, or None for a file of rows."""
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
    """Read lines by the arrays of :func:`find_members`; ``open_rows`` creates a source from Parquet files."""

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
            DataError: if the file or the image in it is missing or cannot be read.
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
