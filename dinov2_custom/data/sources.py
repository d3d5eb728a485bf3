"""Sources of image bytes: the base class, and folders of files. Imports neither image libraries nor torch.

A source has ``len``, ``read(i) -> bytes``, ``name(i) -> str`` and ``parts()``. List files, tar shards and Parquet files
are in ``lists``, ``tar_shards`` and ``parquet``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2_custom.errors import DINOv2Error, UnreadableImageError, shortage

from .index import CACHE_FROM, PathTable, cached, pack_stamps, pack_texts
from .listing import EXTENSIONS, Listing, PassedOver, is_pattern, list_chunks

Root = str | os.PathLike[str]
MAX_IMAGE_BYTES = 1 << 30  # limit for one encoded image from any source
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}


class Source:
    """Images by number."""

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """Return the name of image ``i``: its path, or ``<file>!<part>``."""
        raise NotImplementedError

    def read(self, i: int) -> bytes:
        """Return the bytes of image ``i``.

        Raises:
            DataError: if they cannot be read.
        """
        raise NotImplementedError

    def parts(self) -> list[tuple[str, int]]:
        """Return (name, number of images) of each folder or file of the source, in order."""
        raise NotImplementedError

    def digest(self) -> str:
        """Return a hash of the images without reading them: of their names and, in tars, their offsets and sizes."""
        digest = hashlib.blake2b(repr(self.parts()).encode("utf-8", "surrogateescape"), digest_size=8)
        index = getattr(self, "index", None)
        for name, array in sorted(index.arrays.items()) if index is not None else ():
            if not name.startswith(("stamp", "other", "passed_over")):  # folder times change without the images
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def left_out(self) -> Counter[str]:
        """Return the number of files (by extension) and other objects found that are not images."""
        return Counter()

    def passed_over(self) -> list[PassedOver]:
        """Return the folders and files some of whose images are missing from the source."""
        index = getattr(self, "index", None)
        rows = [] if index is None else PathTable(index=index, name="passed_over")
        return [PassedOver(*row.split("\0")) for row in rows]


def pack_passed_over(those: Iterable[PassedOver]) -> dict[str, np.ndarray]:
    """Pack the warnings that an index repeats when it is read from the cache."""
    return pack_texts([["\0".join(one) for one in those]], "passed_over")


class PathSource(Source):
    """The files of ``paths``, a table that a subclass sets."""

    paths: PathTable

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return self.paths[i]

    def read(self, i: int) -> bytes:
        return read_file(self.paths[i])


class FolderSource(PathSource):
    """All image files below one or more folders; a large listing is cached and reused while nothing has changed.

    Raises:
        DataError: if a folder is missing, or none holds an image.
    """

    def __init__(
        self, root: Root | Sequence[Root], extensions: Sequence[str] = EXTENSIONS, *, cache_from: int = CACHE_FROM
    ):
        self.roots = as_roots(root)
        if any(map(is_pattern, self.roots)):
            cache_from = sys.maxsize  # never: no time stamp reveals new matches of a pattern
        places = [place for one in self.roots for place in (one, real(one))]
        key = ["folders, passed over", *sorted(set(extensions)), *places]
        self.index = cached(key, lambda on_count: index_folders(self.roots, extensions, on_count), cache_from)
        self.paths = PathTable(index=self.index)

    def parts(self) -> list[tuple[str, int]]:
        return list(zip(self.roots, self.index["root_sizes"].tolist(), strict=True))

    def left_out(self) -> Counter[str]:
        rows = (row.partition(" ") for row in PathTable(index=self.index, name="other"))
        return Counter({kind: int(count) for count, _, kind in rows})


def index_folders(
    roots: Sequence[str], extensions: Sequence[str], on_count: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """List folders into the arrays of an :class:`Index`: paths, number of images per root, stamps of every folder."""
    started = time.time_ns()
    listing = Listing(extensions, on_count)
    sizes: list[int] = []

    def counted(chunks: Iterable[list[str]]) -> Iterator[list[str]]:
        sizes.append(0)
        for chunk in chunks:
            sizes[-1] += len(chunk)
            yield chunk

    packed = pack_texts(itertools.chain.from_iterable(map(counted, list_chunks(roots, listing))), "path")
    places, stats = [place for place, _ in listing.stamps], [status for _, status in listing.stamps]
    others = pack_texts([[f"{count} {kind}" for kind, count in listing.others.most_common()]], "other")
    packed |= others | pack_passed_over(listing.passed_over)
    return {**packed, "root_sizes": np.array(sizes, np.int64), **pack_stamps(places, stats, started)}


def read_file(path: Root) -> bytes:
    """Return the bytes of an image file.

    Raises:
        DataError: if it cannot be read (missing, no permission, I/O error), is not a regular file, or is too large.
        ResourceError: if the process has no memory or file descriptors left.
    """
    name = os.fspath(path)
    try:
        # without O_NONBLOCK, opening a named pipe blocks until its other end is opened
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = _KINDS.get(stat.S_IFMT(status.st_mode), "device")
                raise UnreadableImageError(f"expected a regular file: {name} (it is a {kind})")
            check_size(status.st_size, name)
            parts, size = [], 0  # more than one part only if the file system reports no size, or it changes
            while part := os.read(descriptor, max(status.st_size + 1, 1 << 16)):
                parts.append(part)
                size += len(part)
                check_size(size, name)
            return b"".join(parts)
        finally:
            os.close(descriptor)
    except (OSError, ValueError, MemoryError) as e:  # ValueError: a NUL byte in the name
        raise unreadable(e, name) from e


def unreadable(error: Exception, name: str) -> DINOv2Error:
    """Return the error to raise for ``error``, which occurred while reading ``name``."""
    reason = f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"
    return shortage(error, name) or UnreadableImageError(f"expected a readable file: {name} ({reason})")


def check_size(size: int, name: str) -> None:
    """Check an image's declared size in bytes before memory is allocated for it.

    Raises:
        DataError: if it exceeds ``MAX_IMAGE_BYTES``.
    """
    if size > MAX_IMAGE_BYTES:
        raise UnreadableImageError(
            f"expected an image of at most {MAX_IMAGE_BYTES >> 20:,} MiB, got {size:,} bytes: {name}; cut it into tiles"
        )


class OpenFiles:
    """Read parts of files, keeping the last ``limit`` of them open; no file position is shared between forks."""

    def __init__(self, limit: int):
        self.limit = limit
        self.descriptors: dict[str, int] = {}

    def read(self, path: str, start: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``start``; fewer only at the end of the file."""
        descriptor = self.descriptors.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.descriptors[path] = descriptor
        if len(self.descriptors) > self.limit:
            os.close(self.descriptors.pop(next(iter(self.descriptors))))
        if hasattr(os, "pread"):
            return os.pread(descriptor, size, start)
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, size)

    def read_all(self, path: str, start: int, size: int, name: str) -> bytes:
        """Return ``size`` bytes from ``start``; errors refer to them as ``name``.

        Raises:
            DataError: if they cannot be read, or the file ends too early.
        """
        check_size(size, name)
        try:
            data = self.read(path, start, size)
        except (OSError, MemoryError) as e:
            raise unreadable(e, name) from e
        if len(data) < size:
            raise UnreadableImageError(f"expected {size:,} bytes, got {len(data):,}, the file ends there: {name}")
        return data

    def close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "descriptors": {}}


def read_image(dataset: Any, i: int) -> bytes:
    """Return the bytes of image ``i`` of any dataset made by ``make_dataset``.

    Raises:
        DataError: if they cannot be read.
    """
    return (getattr(dataset, "read", None) or dataset.get_image_data)(i)


def as_roots(root: Root | Sequence[Root]) -> list[str]:
    """Return a list of folder paths, with ``~`` expanded and trailing separators removed."""
    roots = [root] if isinstance(root, str | os.PathLike) else list(root)
    return [str(Path(os.path.expanduser(one))) for one in roots]


def real(path: str) -> str:
    """Return the absolute path with symbolic links resolved."""
    return os.path.realpath(path)
