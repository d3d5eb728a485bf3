"""Files that outlive a process or are shared by several: the lock of a folder, and the cache."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: set[IO[str]] = set()


class LockedError(Exception):
    """Another process, or another thread of this one, holds the lock."""


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

    What a cache holds is believed, so anybody who can write to it decides what this process does.
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
