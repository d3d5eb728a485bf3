"""Images in Parquet files and in the Arrow files of Hugging Face datasets: a column of bytes or of {bytes, path}.

Needs pyarrow (extra ``parquet``). A Parquet file can only be read a row group at a time: the last few are kept, and
small row groups (or Arrow files, which are memory-mapped and read in place) make random access cheap.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinov2_custom.errors import DataError, optional, shortage

from .listing import PassedOver
from .sources import Root, Source, as_roots, check_size, read_file
from .tar_shards import find_files

logger = logging.getLogger("dinov2")
SUFFIXES = (".parquet", ".arrow")
ARROW_FILE, END_OF_STREAM = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
CACHE_BYTES = 256 << 20
LARGE_GROUP = 64 << 20
COLUMNS = ("image", "img", "jpg", "png")


class ParquetSource(Source):
    """The images in ``column`` of Parquet or Arrow files; ``path`` names files, folders and brace patterns.

    ``column`` is optional if only one column can hold images. ``cache_bytes``: size limit of the row groups cached per
    process (at least one is kept).

    Raises:
        DataError: if pyarrow is not installed, files are missing or corrupt, or there is no such column.
    """

    def __init__(self, path: Root | Sequence[Root], column: str | None = None, *, cache_bytes: int = CACHE_BYTES):
        arrow()
        self._passed_over: list[PassedOver] = []
        self.files = find_files(as_roots(path), SUFFIXES, "Parquet or Arrow files", self._passed_over)
        self.cache_bytes = cache_bytes
        self._forget()
        self.column, rows, groups = column, [], []
        largest = 0
        for number, file in enumerate(self.files):
            reader = self._open(number)
            self.column = image_column(reader.schema, self.column, file)
            rows += reader.group_rows()
            groups += [(number, group) for group in range(len(reader.group_rows()))]
            largest = max(largest, reader.group_bytes(self.column))
            if not reader.has_end:
                rows_here = sum(reader.group_rows())
                reason = f"truncated stream: {rows_here:,} rows without an end mark after them, any more are missing"
                self._passed_over.append(PassedOver(file, reason))
        self.ends = np.cumsum(rows, dtype=np.int64)
        self.groups = np.array(groups, np.int64).reshape(-1, 2)
        self._forget()
        if not len(self):
            raise DataError(f"expected rows with images, got none in {', '.join(self.files[:3])}; check path=")
        if largest > LARGE_GROUP:
            logger.warning(
                f"large row groups: up to {largest >> 20} MiB are read for each image; write the files again with row "
                "groups of 100 rows, or as tar shards"
            )

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def name(self, i: int) -> str:
        """Return ``<file>!<row>``."""
        group, row = self._place(i)
        file = self.groups[group, 0]
        first = np.searchsorted(self.groups[:, 0], file)
        before = self.ends[group - 1] - (self.ends[first - 1] if first else 0) if group > first else 0
        return f"{self.files[file]}!{before + row}"

    def read(self, i: int) -> bytes:
        group, row = self._place(i)
        number, own = self.groups[group].tolist()
        try:
            value = self._group(number, own)[row].as_py()
        except (OSError, ValueError, IndexError, MemoryError, arrow().ArrowException) as e:
            reason = f"{type(e).__name__}: {e}"
            raise shortage(e, self.name(i)) or DataError(f"expected a readable row: {self.name(i)} ({reason})") from e
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            if data is None and path:
                return read_file(os.path.join(os.path.dirname(self.files[number]), path))
            value = data
        if value is None:
            raise DataError(f"expected an image, got null: {self.name(i)}")
        check_size(len(value), self.name(i))
        return value

    def parts(self) -> list[tuple[str, int]]:
        counts = np.bincount(self.groups[:, 0], weights=np.diff(self.ends, prepend=0), minlength=len(self.files))
        return list(zip(self.files, counts.astype(int).tolist(), strict=True))

    def passed_over(self) -> list[PassedOver]:
        return self._passed_over

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"expected 0..{len(self) - 1}, got {i}")
        group = int(np.searchsorted(self.ends, i, side="right"))
        return group, int(i - (self.ends[group - 1] if group else 0))

    # open files and row groups belong to one process: those of pyarrow do not survive a fork

    def _forget(self) -> None:
        self._process = os.getpid()
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._cache: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def _open(self, number: int) -> Any:
        if self._process != os.getpid():
            self._forget()
        if number not in self._readers:
            if len(self._readers) >= 64:
                self._readers.popitem(last=False)
            self._readers[number] = open_reader(self.files[number])
        return self._readers[number]

    def _group(self, number: int, group: int) -> Any:
        reader = self._open(number)
        if reader.in_place:
            return reader.read(group, self.column)
        key = (number, group)
        if key not in self._cache:
            values = reader.read(group, self.column)
            while self._cache and sum(kept.nbytes for kept in self._cache.values()) + values.nbytes > self.cache_bytes:
                self._cache.popitem(last=False)
            self._cache[key] = values
        self._cache.move_to_end(key)
        return self._cache[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict(), "_cache": OrderedDict()}


class ParquetReader:
    """Row groups of one Parquet file, read in the calling thread."""

    in_place = False
    has_end = True  # otherwise the file cannot be opened

    def __init__(self, file: str):
        import pyarrow.parquet

        self.file = pyarrow.parquet.ParquetFile(file, memory_map=True, pre_buffer=False)
        self.schema = self.file.schema_arrow

    def group_rows(self) -> list[int]:
        return [self.file.metadata.row_group(i).num_rows for i in range(self.file.metadata.num_row_groups)]

    def group_bytes(self, column: str) -> int:
        """Return the uncompressed size of the largest row group of ``column``."""
        largest = 0
        for i in range(self.file.metadata.num_row_groups):
            group = self.file.metadata.row_group(i)
            parts = [group.column(k) for k in range(group.num_columns)]
            own = [part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == column]
            largest = max(largest, sum(own))
        return largest

    def read(self, group: int, column: str) -> Any:
        return self.file.read_row_group(group, columns=[column], use_threads=False).column(column)


class ArrowReader:
    """Record batches of one Arrow file (stream format, as Hugging Face writes it, or file format), memory-mapped."""

    in_place = True

    def __init__(self, file: str):
        import pyarrow as pa

        source = pa.memory_map(file)
        if source.read(len(ARROW_FILE)) == ARROW_FILE:
            reader = pa.ipc.open_file(source)
            self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            self.has_end = True
        else:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            self.batches = list(reader)
            source.seek(max(source.size() - len(END_OF_STREAM), 0))
            self.has_end = source.read() == END_OF_STREAM
        self.schema = reader.schema
        self._valid: set[tuple[int, str]] = set()

    def group_rows(self) -> list[int]:
        return [batch.num_rows for batch in self.batches]

    def group_bytes(self, column: str) -> int:
        return 0

    def read(self, group: int, column: str) -> Any:
        """Return the values of ``column`` in one record batch.

        Raises:
            ArrowInvalid: if offsets or lengths exceed the batch; reading further would crash the process.
        """
        values = self.batches[group].column(column)
        if (group, column) not in self._valid:
            values.validate(full=True)
            self._valid.add((group, column))
        return values


def open_reader(file: str) -> ParquetReader | ArrowReader:
    """Open a file by its suffix.

    Raises:
        DataError: if the file is corrupt.
    """
    pa = arrow()
    try:
        return ArrowReader(file) if file.lower().endswith(".arrow") else ParquetReader(file)
    except (OSError, pa.ArrowException) as e:
        raise DataError(f"expected a Parquet or Arrow file: {file} ({type(e).__name__}: {e})") from e


def image_column(schema: Any, column: str | None, file: str) -> str:
    """Return ``column``, or the only column that can hold images.

    Raises:
        DataError: if there is none, or there are several without a usual name.
    """
    fit = [field.name for field in schema if _holds_images(field.type)]
    if column is None:
        usual = [name for name in COLUMNS if name in fit]
        column = fit[0] if len(fit) == 1 else usual[0] if usual else None
    if fit.count(column) > 1:
        raise DataError(f"expected one column {column!r}, got {fit.count(column)} of that name: {file}; rename them")
    if column in fit:
        return column
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    wanted = "one column of image bytes, named with column=" if column is None else f"image bytes in column {column!r}"
    raise DataError(f"expected {wanted}, got {there}: {file}")


def _holds_images(kind: Any) -> bool:
    types = arrow().types
    if types.is_struct(kind):
        return [field.name for field in kind if _is_binary(field.type)].count("bytes") == 1
    return _is_binary(kind)


def _is_binary(kind: Any) -> bool:
    return arrow().types.is_binary(kind) or arrow().types.is_large_binary(kind)


def arrow() -> Any:
    """Import pyarrow."""
    for name in ("pyarrow.ipc", "pyarrow.types"):
        optional(name, "Parquet and Hugging Face data", DataError)
    return optional("pyarrow", "Parquet and Hugging Face data", DataError)
