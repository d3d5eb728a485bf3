"""Hold images out of training (``train.path_preserved``, ``train.frac``) and list them in a text file, one path a line.

The list is the truth: where it exists it is used as it is, so a resumed run holds out the same images. Kept in memory
are a hash of every image and the names of those held out.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.files import atomic_write

from .listing import Progress
from .sources import as_roots

logger = logging.getLogger("dinov2")
LIST_NAME = "preserved_images.txt"


class IndexSubset(Dataset):
    """The samples of ``dataset`` at ``indices``, under their own names."""

    def __init__(self, dataset: Any, indices: np.ndarray):
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))

    def get_image_data(self, index: int) -> bytes:
        """Return the bytes of image ``index``."""
        return self.dataset.get_image_data(int(self.indices[index]))

    read = get_image_data

    def shares(self) -> list[tuple[str, int, float]]:
        """Return (name, number of images, share of the draws) of every part of ``dataset``."""
        parts = self.dataset.shares()
        ends = np.searchsorted(self.indices, np.cumsum([number for _, number, _ in parts]))
        numbers = np.diff(ends, prepend=0).tolist()
        return [(part[0], number, number / len(self)) for part, number in zip(parts, numbers, strict=True)]


def split_off(
    dataset: Any, path_preserved: str | Sequence[str], frac: float, output_dir: str = ".", write: bool = True
) -> Any:
    """Return ``dataset`` without the images that are held out.

    ``path_preserved``: a text file to keep the list in, with ``frac`` of all images held out; or one or several
    folders, with ``frac`` of the images below them held out and the list in ``output_dir/preserved_images.txt``. Which
    images is a function of their paths below the common folder alone. ``write``: write the list (one rank only).

    Raises:
        ConfigError: one of the two keys without the other.
        DataError: nothing left to train on.
    """
    if not path_preserved and frac in (0, 1):  # 1: a fork's default, which holds nothing out without folders
        return dataset
    folders, list_file = _where(path_preserved, frac, output_dir)
    listed = os.path.isfile(list_file)
    held_out = _read_list(list_file) if listed else choose(_Names(dataset, folders), frac)
    kept = np.flatnonzero(np.fromiter((name not in held_out for name in _Names(dataset)), np.bool_, len(dataset)))
    if not len(kept):
        raise DataError(f"expected images left to train on, got all {len(dataset)} of them held out by {list_file}")
    if write and not listed:
        _write_list(list_file, sorted(held_out))
    logger.info(f"held out: {len(dataset) - len(kept)} of {len(dataset)} images, listed in {list_file}")
    return dataset.subset(kept, IndexSubset) if hasattr(dataset, "subset") else IndexSubset(dataset, kept)


def _where(path_preserved: str | Sequence[str], frac: float, output_dir: str) -> tuple[list[str] | None, str]:
    """Return (folders to choose from, None for everything; path of the list)."""
    if not path_preserved:
        raise ConfigError(
            f"train.path_preserved: expected a text file to list the held-out images in (train.frac={frac}), got ''"
        )
    places = as_roots(path_preserved)
    folders = [place for place in places if os.path.isdir(place)]
    if len(folders) == len(places):
        list_file = os.path.join(output_dir, LIST_NAME)
    elif len(places) == 1 and (os.path.isfile(places[0]) or os.path.splitext(places[0])[1]):
        folders, list_file = None, places[0]
    else:
        missing = ", ".join(place for place in places if place not in folders)
        raise ConfigError(
            f"train.path_preserved: expected existing folders, or a file such as held_out.txt to keep a list in, "
            f"got {missing} (missing)"
        )
    if not frac and not os.path.isfile(list_file):
        raise ConfigError(f"train.frac: expected a share above 0 of the images to list in {list_file}, got {frac}")
    return folders, list_file


class _Names:
    """The absolute names of the images of a dataset, one at a time: all, or those that may be held out.

    These are the ones below ``folders``.
    """

    def __init__(self, dataset: Any, folders: list[str] | None = None):
        self.dataset = dataset
        self.prefixes = None if folders is None else tuple(os.path.join(os.path.abspath(one), "") for one in folders)

    def __iter__(self) -> Iterator[str]:
        progress = Progress("reading the names of the images", "images")
        for i in range(len(self.dataset)):
            if i % 4096 == 4095:
                progress.add(4096)
            name = _absolute(self.dataset.name(i))
            if self.prefixes is None or name.startswith(self.prefixes):
                yield name


def _absolute(name: str) -> str:
    return name if name[:1] == "/" and "/." not in name and "//" not in name else os.path.abspath(name)


def choose(names: Iterable[str], frac: float) -> set[str]:
    """Return ``frac`` of ``names`` (iterated more than once), rounded: those whose paths below the common folder have
    the least hashes. Names with a line break are left out."""
    names = _Listable(names)
    least, greatest = min(names, default=None), max(names, default=None)
    if least is None:
        return set()
    common = os.path.commonpath([least, greatest]) if least != greatest else os.path.dirname(least)
    start = len(os.path.join(common, ""))
    hashes = np.fromiter((_hash(name[start:]) for name in names), np.uint64)
    number = round(frac * len(hashes))
    chosen = np.zeros(len(hashes), np.bool_)
    chosen[np.argsort(hashes, kind="stable")[:number]] = True
    return set(itertools.compress(names, chosen))


class _Listable:
    def __init__(self, names: Iterable[str]):
        self.names = names

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if "\n" not in name)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "big")


def _read_list(path: str) -> set[str]:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return {_absolute(line.rstrip("\n")) for line in file if line.strip()}


def _write_list(path: str, names: list[str]) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with atomic_write(path) as file:
        file.writelines(name + "\n" for name in names)
