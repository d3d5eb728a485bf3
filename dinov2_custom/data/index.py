"""Index of a large collection: named arrays in one file, memory-mapped by every process that reads it.

A large listing is cached in ``$XDG_CACHE_HOME/dinov2_custom`` (default ``~/.cache/dinov2_custom``) under a key that
identifies what was listed, with the time stamps of the folders or shards, and is reused while they are unchanged. Thus
data-loading processes share one mapping and no process holds one Python object per file. When several processes start
together, one lists and the others wait for its file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dinov2_custom.errors import DataError
from dinov2_custom.files import LockedError, atomic_write, cache_folder, locked, ours, parse_json_object

from .listing import PatientMap

logger = logging.getLogger("dinov2")
MAGIC = b"DV2IDX01"
HEADER = struct.Struct("<8sQI")
ALIGNMENT = 64
CACHE_FROM = 20_000
RACY_NS = 2_000_000_000

Build = Callable[[Callable[[int], None]], dict[str, np.ndarray]]


class Index:
    """Named arrays, in memory or mapped from a file. A mapped index pickles as its file name."""

    def __init__(self, arrays: dict[str, np.ndarray], file: str = "", ident: str = ""):
        self.arrays = arrays
        self.file = file
        self.ident = ident

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "arrays": {}} if self.file else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.file:
            again = load(self.file)
            if again is None or again.ident != self.ident:
                raise DataError(
                    f"expected the index {self.file} from the start of this run, got another; run the command again"
                )
            self.arrays = again.arrays


class PathTable(Sequence):
    """Read-only sequence of strings in two buffers: in memory, or ``<name>_text`` and ``_ends`` of an ``Index``."""

    def __init__(self, paths: Iterable[str] = (), *, index: Index | None = None, name: str = "path"):
        if index is None:
            index = Index(pack_texts([list(paths)], name))
        self.index = index
        self.name = name
        self._text, self._ends = index[f"{name}_text"], index[f"{name}_ends"]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"expected 0..{len(self) - 1}, got {i}")
        start = int(self._ends[i - 1]) if i else 0
        return os.fsdecode(self._text[start : int(self._ends[i])].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def pack_texts(chunks: Iterable[Sequence[str]], name: str) -> dict[str, np.ndarray]:
    """Pack strings, given in chunks, into ``<name>_text`` (uint8, concatenated) and ``<name>_ends`` (uint64)."""
    parts, lengths = [], []
    for chunk in chunks:
        text = "".join(chunk)
        if text.isascii():
            parts.append(text.encode())
            lengths.append(np.fromiter(map(len, chunk), np.uint64, len(chunk)))
        else:
            encoded = [os.fsencode(one) for one in chunk]
            parts.append(b"".join(encoded))
            lengths.append(np.fromiter(map(len, encoded), np.uint64, len(encoded)))
    ends = np.cumsum(np.concatenate(lengths or [np.empty(0, np.uint64)]), dtype=np.uint64)
    return {f"{name}_text": np.frombuffer(b"".join(parts), np.uint8), f"{name}_ends": ends}


def cached(key: Sequence[str], build: Build, cache_from: int = CACHE_FROM) -> Index:
    """Return the arrays of ``build``, from the cache while its stamps are valid.

    ``key``: strings that identify what is listed and how. ``build(on_count)`` returns arrays, including those of
    :func:`pack_stamps`, and calls ``on_count(n)`` from time to time with the number of files so far. Listings of fewer
    than ``cache_from`` files stay in memory and are not written to disk.
    """
    try:
        file = cache_file(key)
    except OSError as e:
        logger.info(f"index: kept in memory ({e})")
        return Index(build(lambda count: None))
    index = load(file)
    if index is not None and stamps_hold(index):
        logger.info(f"index: {file} is current (delete it to list again)")
        return index
    seen = index.ident if index else ""
    with _Lock(file + ".lock", cache_from) as lock:
        try:
            arrays = build(lock.on_count)
        except _LockHeld:
            logger.info(f"index: waiting for the process that writes {file}")
            lock.wait()
            index = load(file)
            if index is not None and index.ident != seen:
                return index
            arrays = build(lambda count: None)
        return _keep(file, arrays) if lock.large else Index(arrays)


def _keep(file: str, arrays: dict[str, np.ndarray]) -> Index:
    try:
        save(file, arrays)
    except OSError as e:
        logger.info(f"index: kept in memory, {file} cannot be written ({e.strerror})")
        return Index(arrays)
    return load(file) or Index(arrays)


def cache_file(key: Sequence[str]) -> str:
    """Return the path of the index file of ``key``.

    Raises:
        OSError: if there is no folder that only this user can write to.
    """
    digest = hashlib.blake2b("\0".join(key).encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    return str(cache_folder() / f"{digest}.idx")


# time stamps


def pack_stamps(
    places: Sequence[str], stats: Sequence[os.stat_result | None], started_ns: int
) -> dict[str, np.ndarray]:
    """Pack the status of folders or files from before they were listed; None marks one as never up to date.

    A folder or file that changed less than two seconds before the listing started (``time.time_ns()``), or later, may
    change again without a new time stamp; it is marked as never up to date as well.
    """
    recent = started_ns - RACY_NS
    times = [status.st_mtime_ns if status and status.st_mtime_ns < recent else -1 for status in stats]
    sizes = [status.st_size if status else -1 for status in stats]
    packed = {"stamp_time": np.array(times, np.int64), "stamp_size": np.array(sizes, np.int64)}
    return {**pack_texts([places], "stamp"), **packed}


def stamps_hold(index: Index) -> bool:
    """Return whether every folder or file in the index is unchanged."""
    stats = PatientMap().map(_stat, PathTable(index=index, name="stamp"))
    return all(
        status is not None and status.st_mtime_ns == time_ns and status.st_size == size
        for status, time_ns, size in zip(stats, index["stamp_time"], index["stamp_size"], strict=True)
    )


def _stat(place: str) -> os.stat_result | None:
    try:
        return os.stat(place)
    except OSError:
        return None


# files


def save(file: str, arrays: dict[str, np.ndarray]) -> None:
    """Write an index file atomically: under a temporary name, then renamed."""
    os.makedirs(os.path.dirname(file), mode=0o700, exist_ok=True)
    table, offset = {}, 0
    for name, array in arrays.items():
        table[name] = [array.dtype.str, len(array), offset]
        offset += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    text = json.dumps({"ident": os.urandom(16).hex(), "size": offset, "arrays": table}).encode()
    text += b" " * (-(HEADER.size + len(text)) % ALIGNMENT)
    with atomic_write(file, "wb", fsync=True, exclusive=True) as out:
        os.chmod(out.name, 0o600)  # load() refuses a file that others can write to
        out.write(HEADER.pack(MAGIC, len(text), zlib.crc32(text)) + text)
        for array in arrays.values():
            out.write(memoryview(np.ascontiguousarray(array)).cast("B") if array.nbytes else b"")
            out.write(bytes(-array.nbytes % ALIGNMENT))


def load(file: str) -> Index | None:
    """Map an index file; return None if it is missing, or (with a log message) damaged or of another version."""
    try:
        with open(file, "rb") as source:
            magic, length, checksum = HEADER.unpack(source.read(HEADER.size))
            text = source.read(length) if magic == MAGIC else b""
        if zlib.crc32(text) != checksum or len(text) != length:
            raise ValueError("its header is damaged or of another version")
        content = parse_json_object(text)
        start = HEADER.size + length
        if os.path.getsize(file) != start + content["size"]:
            raise ValueError("its size is wrong")
        if not ours(file):
            raise ValueError("others may write to it")
        whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, MemoryError, OverflowError, struct.error) as e:
        logger.warning(f"index: {file} is not used and will be rebuilt ({e})")
        return None
    arrays = {}
    for name, (kind, count, offset) in content["arrays"].items():
        first, dtype = start + offset, np.dtype(kind)
        arrays[name] = whole[first : first + count * dtype.itemsize].view(dtype)
    return Index(arrays, file, content["ident"])


# one process lists, the others wait


class _LockHeld(Exception):
    pass


class _Lock(contextlib.ExitStack):
    """A lock that is acquired only after ``cache_from`` files have been counted."""

    def __init__(self, file: str, cache_from: int):
        super().__init__()
        self.file = file
        self.cache_from = cache_from
        self.large = False

    def on_count(self, count: int) -> None:
        if count >= self.cache_from and not self.large:
            self.large = True
            try:
                self._take()
            except LockedError:
                raise _LockHeld from None

    def wait(self) -> None:
        self.large = True
        self._take(timeout_s=-1)

    def _take(self, **options: float) -> None:
        with contextlib.suppress(OSError):  # if the folder is not writable, the index stays in memory
            os.makedirs(os.path.dirname(self.file), mode=0o700, exist_ok=True)
            self.enter_context(locked(self.file, **options))
