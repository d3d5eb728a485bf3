"""Map image names to output names relative to the dataset's folders, so that class folders are preserved."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

ODD = re.compile(r"[\x00-\x1f\x7f]|[:*?\"<>|]")


class Names:
    """Map the name of an image to a relative name with "/", without "..", that is safe on every file system.

    ``roots``: the dataset's folders; if there are several, the name begins with that of its folder. Parts of archives
    (``<file>!<part>``) are named after the part.
    """

    def __init__(self, roots: Sequence[str]):
        self.roots = [(os.path.abspath(root), label) for root, label in zip(roots, _labels(roots), strict=True)]
        self.roots.sort(key=lambda pair: -len(pair[0]))

    @classmethod
    def of(cls, dataset: Any) -> Names:
        """Create the mapping for a dataset from its folders, or else from the common folder of all images."""
        parts = [root for one in getattr(dataset, "datasets", [dataset]) for root in _roots(one)]
        roots = [root for root in dict.fromkeys(parts) if isinstance(root, str) and os.path.isdir(root)]
        return cls(roots or _common_folder(dataset.name, len(dataset)))

    def __call__(self, name: str) -> str:
        """Return the relative name of image ``name``."""
        file, _, part = name.partition("!") if not os.path.exists(name) else (name, "", "")
        if part:
            return _clean(part)
        path = os.path.abspath(file) if os.path.isabs(file) or os.path.exists(file) else file
        for root, label in self.roots:
            if path.startswith(root.rstrip(os.sep) + os.sep):
                return _clean(f"{label}/{path[len(root) :]}")
        return _clean(file)


def _roots(dataset: Any) -> list[Any]:
    source = getattr(dataset, "source", dataset)
    return list(getattr(source, "roots", None) or [getattr(source, "root", None)])


def _labels(roots: Sequence[str]) -> list[str]:
    """Return "" for a single root, or else a distinct final path component for each."""
    if len(roots) < 2:
        return [""] * len(roots)
    labels: list[str] = []
    for root in roots:
        label = wanted = os.path.basename(os.path.abspath(root)) or "root"
        number = 2
        while label in labels:
            label, number = f"{wanted}_{number}", number + 1
        labels.append(label)
    return labels


def _common_folder(name: Callable[[int], str], count: int) -> list[str]:
    """Return the common folder of all images, or its parent if they are directly in it, as its name may be a class."""
    folder: str | None = None
    direct = False
    for i in range(count):
        one = name(i)
        if not os.path.isabs(one):
            return []
        parent = os.path.dirname(one)
        common = parent if folder in (None, parent) else os.path.commonpath([folder, parent])
        direct = (direct and common == folder) or parent == common
        folder = common
    if folder is None:
        return []
    return [os.path.dirname(folder) if direct else folder]


def _clean(name: str) -> str:
    parts = [ODD.sub("_", part) for part in name.replace(os.sep, "/").split("/")]
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "image"


class Taken:
    """Record the names in use (8 bytes each) and make new names distinct."""

    def __init__(self, names: Iterable[str] = ()):
        self._seen = {_digest(name) for name in names}

    def free(self, name: str) -> str:
        """Return and record ``name``, with a number before its suffix if it is already in use."""
        stem, suffix = os.path.splitext(name)
        found, number = name, 2
        while _digest(found) in self._seen:
            found, number = f"{stem}_{number}{suffix}", number + 1
        self._seen.add(_digest(found))
        return found


def _digest(name: str) -> int:
    # names that differ only in case are the same file on some systems
    return int.from_bytes(
        hashlib.blake2b(name.lower().encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )
