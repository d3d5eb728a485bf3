"""Hold images out of training (``train.path_preserved``, ``train.frac``) and list them in a text file, one path a line.

The list is the truth: where it exists it is used as it is, so a resumed run holds out the same images. Read
:func:`split_off` first.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2_custom.errors import ConfigError, DataError

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
    if not path_preserved and not frac:
        return dataset
    folders, list_file = _where(path_preserved, frac, output_dir)
    names = [os.path.abspath(dataset.name(i)) for i in range(len(dataset))]
    if os.path.isfile(list_file):
        held_out = _read_list(list_file)
        kept = [i for i, name in enumerate(names) if name not in held_out]
    else:
        held_out = choose(_below(names, folders), frac)
        kept = [i for i, name in enumerate(names) if name not in held_out]
        if write and kept:
            _write_list(list_file, sorted(held_out))
    if not kept:
        raise DataError(f"expected images left to train on, got all {len(names)} of them held out by {list_file}")
    logger.info(f"held out: {len(names) - len(kept)} of {len(names)} images, listed in {list_file}")
    return IndexSubset(dataset, np.array(kept, dtype=np.int64))


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
    elif len(places) == 1:
        folders, list_file = None, places[0]
    else:
        missing = ", ".join(place for place in places if place not in folders)
        raise ConfigError(f"train.path_preserved: expected existing folders, got {missing}")
    if not frac and not os.path.isfile(list_file):
        raise ConfigError(f"train.frac: expected a share above 0 of the images to list in {list_file}, got {frac}")
    return folders, list_file


def _below(names: list[str], folders: list[str] | None) -> list[str]:
    """Return the names that may be held out (a name with a line break cannot be listed)."""
    names = [name for name in names if "\n" not in name]
    if folders is None:
        return names
    prefixes = tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)
    return [name for name in names if name.startswith(prefixes)]


def choose(names: Sequence[str], frac: float) -> set[str]:
    """Return ``frac`` of ``names``, rounded: those whose paths below the common folder have the least hashes."""
    if not names:
        return set()
    common = os.path.commonpath(names) if len(names) > 1 else os.path.dirname(names[0])
    hashes = [hashlib.blake2b(os.fsencode(os.path.relpath(name, common)), digest_size=8).digest() for name in names]
    order = sorted(range(len(names)), key=lambda i: (hashes[i], names[i]))
    return {names[i] for i in order[: round(frac * len(names))]}


def _read_list(path: str) -> set[str]:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return {os.path.abspath(line.rstrip("\n")) for line in file if line.strip()}


def _write_list(path: str, names: list[str]) -> None:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(name + "\n" for name in names)
    os.replace(path + ".tmp", path)
