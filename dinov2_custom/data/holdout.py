"""Hold images out of training (``train.path_preserved``, ``train.frac``) and list them in a text file.

The file has one path per line. An existing list is used unchanged, so that a resumed run holds out the same images.
Memory holds one hash per image and the names of the held-out images.
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
from dinov2_custom.files import write_text

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
        return self.dataset.get_image_data(int(self.indices[index]))

    read = get_image_data

    def shares(self) -> list[tuple[str, int, float]]:
        """Return (name, number of images, share of the draws) of every part of ``dataset``."""
        parts = self.dataset.shares()
        ends = np.searchsorted(self.indices, np.cumsum([number for _, number, _ in parts]))
        numbers = np.diff(ends, prepend=0).tolist()
        return [(part[0], number, number / len(self)) for part, number in zip(parts, numbers, strict=True)]


def split(
    dataset: Any, path_preserved: str | Sequence[str], frac: float, output_dir: str = ".", write: bool = True
) -> tuple[Any, IndexSubset | None]:
    """Return ``dataset`` without the held-out images, and these, or None if there are none.

    ``path_preserved`` is either a text file for the list, in which case a fraction ``frac`` of all images is held out,
    or one or more folders, in which case that fraction of the images below them is held out and the list is
    ``output_dir/preserved_images.txt``. The choice depends only on the paths relative to the common folder.
    ``write``: write the list (one rank only).

    Raises:
        ConfigError: if only one of the two keys is set.
        DataError: if no training image is left, or none is held out.
    """
    if not path_preserved and frac in (0, 1):  # 1 is a fork's default; without folders it holds out nothing
        return dataset, None
    folders, list_file = _where(path_preserved, frac, output_dir)
    listed = os.path.isfile(list_file)
    held_out = _read_list(list_file) if listed else choose(_Names(dataset, folders), frac)
    if not held_out:
        raise DataError(_nothing_held_out(dataset, folders, frac, list_file if listed else ""))
    is_kept = np.fromiter((name not in held_out for name in _Names(dataset)), np.bool_, len(dataset))
    kept, others = np.flatnonzero(is_kept), np.flatnonzero(~is_kept)
    if not len(kept):
        raise DataError(
            f"expected images left to train on, got all {len(dataset)} of them held out by {list_file}; remove paths "
            "from this file, or delete it and lower train.frac"
        )
    if write and not listed:
        os.makedirs(os.path.dirname(os.path.abspath(list_file)), exist_ok=True)
        write_text(list_file, "".join(f"{name}\n" for name in sorted(held_out)))
    logger.info(f"held out: {len(dataset) - len(kept)} of {len(dataset)} images, listed in {list_file}")
    rest = dataset.subset(kept, IndexSubset) if hasattr(dataset, "subset") else IndexSubset(dataset, kept)
    return rest, IndexSubset(dataset, others) if len(others) else None


def _nothing_held_out(dataset: Any, folders: list[str] | None, frac: float, empty_list: str) -> str:
    if empty_list:
        return (
            f"train.path_preserved: expected a list of at least one held-out image, got an empty file {empty_list}; "
            "delete it, and train.frac chooses the images anew"
        )
    number = sum(1 for _ in _Names(dataset, folders))
    return (
        f"train.frac: expected at least one image to hold out, got 0 of {number:,} by train.frac={frac}; raise "
        "train.frac, or hold out nothing with train.frac=0 and an empty train.path_preserved"
    )


def _where(path_preserved: str | Sequence[str], frac: float, output_dir: str) -> tuple[list[str] | None, str]:
    """Return (folders to choose from, or None for all images; path of the list)."""
    if not path_preserved:
        raise ConfigError(
            f"train.path_preserved: expected a text file for the list of held-out images (train.frac={frac}), got ''; "
            "set it, for example to held_out.txt"
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
            "train.path_preserved: expected existing folders, or a file such as held_out.txt for the list, got "
            f"{missing} (missing); check the path"
        )
    if not frac and not os.path.isfile(list_file):
        raise ConfigError(
            f"train.frac: expected a share above 0 of the images to hold out, got {frac}, and there is no list "
            f"{list_file}; set it, for example to 0.1"
        )
    return folders, list_file


class _Names:
    """Iterable over the absolute names of a dataset's images: all, or only those below ``folders``."""

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
    """Return a fraction ``frac`` of ``names``: those whose paths relative to the common folder hash lowest.

    ``names`` is iterated over more than once. Names that contain a line break are never chosen.
    """
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
