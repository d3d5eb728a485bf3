"""Dataset strings -> DatasetSpec: what kind of dataset, where, with which options. Opens nothing.

======================================================  ====================================================
``/my/images``, ``~/images``, ``C:\\images``              a folder of images, without labels
a list of such folders                                  all of them together
``ImageDataset:root=/my/images``                        the same; also ``ImageFolder``, ``RecursiveImageDataset``
``LabelledFolder:root=/my/classes``                     a folder a class, for evaluation
``ImageNet:split=TRAIN:root=/imagenet:extra=/extra``    upstream's layout; ``extra`` optional
``ImageNet22k:root=/imagenet22k:extra=/extra``          upstream's layout; ``extra`` optional
======================================================  ====================================================

A value with ':' or '=' goes in double quotes: ``ImageDataset:root="/a:b"``. What exists as a path is taken as a path.
``root`` may be given several times for ImageDataset. Read :func:`parse_dataset` first.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dinov2_custom.errors import ConfigError

KINDS = {
    "ImageDataset": ("root",),
    "ImageFolder": ("root",),
    "RecursiveImageDataset": ("root",),
    "LabelledFolder": ("root",),
    "ImageNet": ("split", "root", "extra"),
    "ImageNet22k": ("root", "extra"),
}
FOLDER_KINDS = ("ImageDataset", "ImageFolder", "RecursiveImageDataset")
SPLITS = ("TRAIN", "VAL", "TEST")

_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
_OPTION = re.compile(r':(?P<key>\w+)=(?:"(?P<quoted>[^"]*)"|(?P<plain>[A-Za-z]:[\\/][^:]*|[^:]*))')


@dataclass(frozen=True)
class DatasetSpec:
    """``kind`` is a dataset's class name; ``roots`` its folders, ``~`` expanded; ``options`` the rest."""

    kind: str
    roots: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)


def parse_dataset(text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> DatasetSpec:
    """Parse a dataset string, a path or a list of them.

    Raises:
        ConfigError: everything that is wrong with it, in one message.
    """
    if isinstance(text, os.PathLike):
        return DatasetSpec("ImageDataset", (_folder(os.fspath(text)),))
    if isinstance(text, str):
        return _parse_one(text)
    parts = [parse_dataset(one) for one in text]
    labelled = sorted({part.kind for part in parts if part.kind != "ImageDataset"})
    if labelled or not parts:
        got = f"{', '.join(labelled)} in a list" if labelled else "an empty list"
        raise ConfigError(f"train.dataset_path: expected a list of image folders, got {got}; give that one alone")
    return DatasetSpec("ImageDataset", tuple(root for part in parts for root in part.roots))


def _parse_one(text: str) -> DatasetSpec:
    if not text.strip():
        raise ConfigError("train.dataset_path: expected a folder of images, got nothing; set it to your folder")
    path = os.path.expanduser(text)
    if os.path.exists(path) or _looks_like_path(text):
        return DatasetSpec("ImageDataset", (_folder(text),))
    if _URL.match(text):
        raise ConfigError(f"train.dataset_path: expected a folder on this machine, got {text}; download or mount it")
    name, colon, rest = text.partition(":")
    if name in KINDS:
        return _parse_options(text, name, colon + rest)
    if re.match(r"\w+=", rest):
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}"
        raise ConfigError(f"train.dataset_path: unknown dataset {name!r} in {text!r}; {hint}")
    return DatasetSpec("ImageDataset", (_folder(text),))


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../")) or _WINDOWS_PATH.match(text) is not None


def _folder(text: str) -> str:
    return str(Path(os.path.expanduser(text)))


def _parse_options(text: str, kind: str, rest: str) -> DatasetSpec:
    """Parse ``:key=value:key="value"`` (a trailing colon is fine) of a known dataset."""
    wrong, pairs, position = [], [], 0
    rest = rest[:-1] if rest.endswith(":") else rest
    while position < len(rest):
        match = _OPTION.match(rest, position)
        if match is None or (match.end() < len(rest) and rest[match.end()] != ":"):
            wrong.append(f"cannot read {rest[position:]!r} (expected :key=value, values with ':' in double quotes)")
            break
        pairs.append((match["key"], match["plain"] if match["quoted"] is None else match["quoted"]))
        position = match.end()
    allowed = KINDS[kind]
    keys = [key for key, _ in pairs]
    wrong += [f"{key}: unknown key (there are {', '.join(allowed)})" for key in keys if key not in allowed]
    repeated = {key for key in keys if keys.count(key) > 1 and not (key == "root" and kind in FOLDER_KINDS)}
    wrong += [f"{key}: given more than once" for key in sorted(repeated)]
    wrong += [f"{key}: empty" for key, value in pairs if not value]
    wrong += _missing(kind, dict(pairs))
    if wrong:
        raise ConfigError(f"train.dataset_path: {text!r}: " + "; ".join(wrong))
    roots = tuple(_folder(value) for key, value in pairs if key == "root")
    options = {key: _folder(value) if key == "extra" else value for key, value in pairs if key != "root"}
    return DatasetSpec("ImageDataset" if kind in FOLDER_KINDS else kind, roots, options)


def _missing(kind: str, given: dict[str, str]) -> list[str]:
    wrong = [] if "root" in given else ["root: missing (expected root=<folder>)"]
    if kind == "ImageNet" and given.get("split") not in SPLITS:
        wrong.append(f"split: expected {', '.join(SPLITS)}, got {given.get('split', 'nothing')}")
    return wrong
