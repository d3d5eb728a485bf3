"""Files that outlive a process or are shared by several: JSON in them, the lock of a folder, and the cache."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: set[IO[str]] = set()


class LockedError(Exception):
    """Another process, or another thread of this one, holds the lock."""


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Return what ``text`` says: the one reader of JSON that a start of this or another process depends on.

    Args:
        finite: refuse NaN and infinities, which JSON does not have and Python's writer writes all the same.

    Raises:
        ValueError: no JSON, a name twice in an object, a number of thousands of digits, or nested too deeply.
    """
    try:
        numbers = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
        return json.loads(text, object_pairs_hook=_without_duplicates, **numbers)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_json_object(text: str | bytes, *, finite: bool = True) -> dict[str, Any]:
    """Do as :func:`parse_json`, for a JSON object alone."""
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
    except RuntimeError as e:  # HOME is not set, and the system does not know this user
        raise OSError(f"no cache folder: {e}; set XDG_CACHE_HOME") from e
    if folder.exists() and not ours(folder):
        raise OSError(f"{folder} belongs to another user, or others may write to it; chmod go-w, or set XDG_CACHE_HOME")
    return folder


def ours(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` belongs to this user and only this user may change it.

    What a cache holds is used as it is, so anybody who can write to it decides what this process does.
    """
    if not hasattr(os, "geteuid"):
        return True
    status = os.stat(path)
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, which is made if it is missing, until the body or the process ends.

    A forked child does not hold it with its parent: it would keep the lock after a ``kill -9`` of the parent. On file
    systems without locks the body runs unprotected.

    Raises:
        LockedError: it is held already.
        OSError: it cannot be opened.
    """
    file = _open_locked(path)
    _held.add(file)
    _close_in_children()
    try:
        yield
    finally:
        _held.discard(file)
        file.close()


def _open_locked(path: Path) -> IO[str]:
    while True:
        file = open(path, "a")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.close()
            raise LockedError(str(path)) from e
        except OSError:  # a file system without locks
            return file
        # the holder before may have deleted the file between our open and our lock: nobody else would see this lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


@functools.cache
def _close_in_children() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for file in _held:
        file.close()
    _held.clear()
