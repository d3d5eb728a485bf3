"""Where the bytes of images come from: folders of files. No image code, no torch.

A source has ``len``, ``read(i) -> bytes`` and ``name(i) -> str``. Not in here: decoding (``decode``), labels and
upstream's layouts (``datasets``). Read :func:`list_images` first.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dinov2_custom.errors import DataError

logger = logging.getLogger("dinov2")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
Root = str | os.PathLike[str]


class PathTable:
    """A read-only sequence of paths in two buffers, which forked workers share and spawned ones unpickle fast."""

    def __init__(self, paths: Iterable[str]):
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"expected 0..{len(self) - 1}, got {i}")
        start = int(self.ends[i - 1]) if i else 0
        return os.fsdecode(self.text[start : int(self.ends[i])])


class FolderSource:
    """All image files below one or several folders.

    Raises:
        DataError: a folder that is missing, or no image in all of them.
    """

    def __init__(self, root: Root | Sequence[Root], extensions: Sequence[str] = EXTENSIONS):
        self.roots = as_roots(root)
        self.paths = PathTable(list_images(self.roots, extensions))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """Return the path of image ``i``."""
        return self.paths[i]

    def read(self, i: int) -> bytes:
        """Return the bytes of image ``i``."""
        return read_file(self.paths[i])


def read_file(path: Root) -> bytes:
    """Return the bytes of a file.

    Raises:
        DataError: it cannot be read (gone, no permission, a broken disk).
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as e:
        raise DataError(f"expected a readable file: {os.fspath(path)} ({type(e).__name__}: {e.strerror})") from e


def as_roots(root: Root | Sequence[Root]) -> list[str]:
    """Return a list of folder paths, with ``~`` expanded and trailing separators removed."""
    roots = [root] if isinstance(root, str | os.PathLike) else list(root)
    return [str(Path(os.path.expanduser(one))) for one in roots]


def list_images(roots: Sequence[str], extensions: Sequence[str] = EXTENSIONS) -> list[str]:
    """List the image files below ``roots``: root after root, each in the order of its sorted relative paths.

    Extensions are compared without case. Hidden files and folders are skipped, links to folders followed (a folder that
    is met again is not entered twice), no file is opened. A folder that may not be read is logged and skipped. The
    order does not depend on the file system.

    Raises:
        DataError: all roots that are not folders, or that none holds an image.
    """
    missing = [root for root in roots if not os.path.isdir(root)]
    if missing or not roots:
        got = "; ".join(f"{root} ({'a file' if os.path.exists(root) else 'missing'})" for root in missing)
        raise DataError(f"expected folders of images, got {got or 'no folder'}; check train.dataset_path")
    others: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    found = [path for root in roots for path in _list_root(root, tuple(e.lower() for e in extensions), others, seen)]
    if not found:
        inside = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5)) or "no files"
        raise DataError(
            f"expected images ({' '.join(extensions)}), got {inside} in {', '.join(roots)}; "
            "check train.dataset_path, or convert the files"
        )
    return found


def _list_root(root: str, extensions: tuple[str, ...], others: Counter[str], seen: set[tuple[int, int]]) -> list[str]:
    """List one root, depth first; count what is no image in ``others``, folders met in ``seen``."""
    found, folders = [], [root]
    while folders:
        folder = folders.pop()
        if not _first_visit(folder, seen):
            continue
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as e:
            logger.warning(f"folder skipped: {folder} ({type(e).__name__}: {e.strerror})")
            others["unreadable folders"] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                folders.append(entry.path)
            elif extension in extensions:
                found.append(entry.path)
            else:
                others[extension or "files without extension"] += 1
    return sorted(found)


def _first_visit(folder: str, seen: set[tuple[int, int]]) -> bool:
    """Remember ``folder`` by device and inode, so that a link that leads back to it ends there."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return False
    seen.add(identity)
    return True
