"""Files that outlive a process or are shared by several: atomic writes, appended rows, locks, the cache, JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger("dinov2")
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
_NO_LOCKS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


class LockedError(Exception):
    """Another process, or another thread of this one, holds the lock."""


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str], mode: str = "w", *, fsync: bool = False, exclusive: bool = False
) -> Iterator[IO[Any]]:
    """Open a new file that replaces ``path`` if the body succeeds: readers see the old file or the whole new one.

    Until then it is ``<name>.tmp`` beside it, removed after an error. A file left by a killed process is overwritten.

    Args:
        mode: "w", which is UTF-8 and can encode any file name, or "wb".
        fsync: flush the data to disk before the rename, so that a power failure loses at most the new file.
        exclusive: several processes may write ``path`` at once; each uses its own temporary name.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp" if exclusive else f"{path.name}.tmp")
    as_text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}
    file = open(temporary, mode, **as_text)
    try:
        with file:
            yield file
            file.flush()
            if fsync:
                flush(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def utf8_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield ``path``, or a link to it if it is not UTF-8: safetensors, onnxruntime and torch's mmap open no other.

    Files opened in the body may be used after it.
    """
    path = Path(path)
    if is_utf8(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "link"
        link.symlink_to(path.absolute())
        yield link


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is UTF-8; on Linux, names of files may be any bytes."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # of the surrogates by which Python represents other bytes
        return False
    return True


def write_text(path: str | os.PathLike[str], text: str, *, fsync: bool = False, exclusive: bool = False) -> None:
    """Write ``text`` with :func:`atomic_write`."""
    with atomic_write(path, fsync=fsync, exclusive=exclusive) as file:
        file.write(text)


def flush(descriptor: int) -> None:
    """Flush the data of an open file to disk; a file system without that operation is not an error.

    Raises:
        OSError: the data could not be written, for example because the disk is full.
    """
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in _NO_FSYNC:
            raise


def append_row(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Append ``row`` to a JSON-lines file in a single write; a torn last line is terminated first.

    NaN and infinities are written in the form that ``json`` reads.
    """
    line = (json.dumps(row) + "\n").encode()
    if os.path.exists(path) and os.path.getsize(path):
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
    with open(path, "ab", buffering=0) as file:
        file.write(line)


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Parse JSON; used for all JSON that the start of this or another process depends on.

    Args:
        finite: refuse NaN and infinities, which are not JSON but which Python's writer emits.

    Raises:
        ValueError: invalid JSON, a duplicate key, a number with thousands of digits, or too deep nesting.
    """
    try:
        numbers = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
        return json.loads(text, object_pairs_hook=_without_duplicates, **numbers)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_json_object(text: str | bytes, *, finite: bool = True) -> dict[str, Any]:
    """Parse JSON as :func:`parse_json` does, but accept only an object."""
    found = parse_json(text, finite=finite)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got a {type(found).__name__}")
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.100} is there twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.100} is no finite number")
    return number


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/dinov2_custom``, or ``~/.cache/dinov2_custom``; it may not exist.

    Raises:
        OSError: there is no home directory, or the folder is not :func:`ours`.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinov2_custom"
    except RuntimeError as e:  # HOME is not set, and the system has no entry for this user
        raise OSError(f"no cache folder: {e}; set XDG_CACHE_HOME") from e
    if folder.exists() and not ours(folder):
        raise OSError(f"{folder} belongs to another user, or others may write to it; chmod go-w, or set XDG_CACHE_HOME")
    return folder


def ours(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` belongs to this user and is writable by this user only.

    Cached content is trusted, so anyone who can write to a cache controls this process.
    """
    if not hasattr(os, "geteuid"):
        return True
    status = os.stat(path)
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, timeout_s: float = 0.2) -> Iterator[None]:
    """Hold the lock file ``path``, which is created if missing, until the body or the process ends.

    A forked child does not inherit the lock, which it would keep after a ``kill -9`` of the parent. Only the
    holder may delete the file. On a file system without locks the body runs unprotected, after a warning.

    Args:
        timeout_s: how long to wait for another holder; negative to wait without limit. Must not be 0: a file that its
            holder deletes at that moment must be reopened.

    Raises:
        LockedError: another process or thread holds it.
        OSError: the file cannot be opened.
    """
    import filelock  # its import is slow, and --help needs no lock

    with contextlib.ExitStack() as stack:
        try:
            # its fallback, a file with the holder's pid, would outlive a kill on another host
            stack.enter_context(filelock.FileLock(path, timeout=timeout_s, fallback_to_soft=False))
        except filelock.Timeout as e:
            raise LockedError(str(path)) from e
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            logger.warning(
                f"{path}: this file system has no locks ({e.strerror}); do not start another command that writes there"
            )
        yield
