"""Parse dataset strings, YAML mappings and lists of them into a DatasetSpec, without opening any data.

======================================================  ====================================================
``/my/images``, ``~/images``, ``C:\\images``              a folder of images, without labels
``/my/files.txt``, ``.csv``, ``.tsv``, ``.jsonl``       a list of image files
``/my/shard-{0000..0127}.tar``, ``/my/x.parquet``       tar shards; Parquet (or ``.arrow``) files
``ImageDataset:root=/my/images``                        a folder; also ``ImageFolder``, ``RecursiveImageDataset``
``ImageList:path=/my/files.csv:column=image``           a list; ``column``, ``root`` (of relative paths) optional
``Tar:path=/my/shards``                                 a folder of tars; also ``WebDataset``
``Parquet:path=/my/shards:column=image``                a folder of Parquet files; ``column`` optional
``Definition:path=/my/data.yaml:part=train``           the images of a dataset definition; ``part`` optional
``LabelledFolder:root=/my/classes``                     one folder per class, for evaluation
``ImageNet:split=TRAIN:root=/imagenet:extra=/extra``    upstream's layout; ``extra`` optional
``ImageNet22k:root=/imagenet22k:extra=/extra``          upstream's layout; ``extra`` optional
``{kind: ImageNet, split: TRAIN, root: /imagenet}``     a mapping, equivalent to a string
``{path: files.csv, column: image}``                    without ``kind``: a path or string with options
``[/my/images, /more/images]``                          all of them combined, in proportion to their sizes
``[{path: /a, weight: 0.7}, {path: /b, weight: 0.3}]``  a mixture; ``name`` optional
======================================================  ====================================================

A value with ':' or '=' goes in quotes: ``ImageDataset:root="/a:b"``. What exists as a path is taken as a path. ``root``
and ``path`` may be given several times where they name images.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2_custom.errors import ConfigError

KINDS = {
    "ImageDataset": ("root",),
    "ImageFolder": ("root",),
    "RecursiveImageDataset": ("root",),
    "ImageList": ("path", "column", "root"),
    "Tar": ("path",),
    "WebDataset": ("path",),
    "Parquet": ("path", "column"),
    "Definition": ("path", "part"),
    "LabelledFolder": ("root",),
    "ImageNet": ("split", "root", "extra"),
    "ImageNet22k": ("root", "extra"),
}
ALIASES = {"ImageFolder": "ImageDataset", "RecursiveImageDataset": "ImageDataset", "WebDataset": "Tar"}
KIND_OF_SUFFIX = {".txt": "ImageList", ".csv": "ImageList", ".tar": "Tar", ".tgz": "Tar", ".tar.gz": "Tar"}
KIND_OF_SUFFIX |= {".tsv": "ImageList", ".jsonl": "ImageList", ".ndjson": "ImageList"}
KIND_OF_SUFFIX |= {".parquet": "Parquet", ".arrow": "Parquet", ".yaml": "Definition", ".yml": "Definition"}
SEVERAL = ("ImageDataset", "Tar", "Parquet")
SPLITS = ("TRAIN", "VAL", "TEST")
# Upstream's datasets of cell images and their keys, which are not supported.
CELL_KINDS = ("HPAone", "HPAFoV", "CHAMMI_CP", "CHAMMI_HPA", "CHAMMI_WTC")
CELL_KEYS = ("mode", "wildcard")
PATHS = ("root", "path", "extra")
KEY = "train.dataset_path"

_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://")
_OPTION = re.compile(
    r""":(?P<key>\w+)=(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<plain>[A-Za-z]:[\\/][^:]*|[^:]*))"""
)

Text = str | os.PathLike[str]


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture; weight None: in proportion to its size."""

    spec: DatasetSpec
    weight: float | None
    name: str


@dataclass(frozen=True)
class DatasetSpec:
    """``kind``: one of KINDS or "Mixture". ``roots``: folders or files, ``~`` expanded. ``options``: all other keys."""

    kind: str
    roots: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()


def parse_dataset(value: Text | Mapping[str, Any] | Sequence[Text | Mapping[str, Any]]) -> DatasetSpec:
    """Parse a dataset string, a path, a mapping or a list of them.

    Raises:
        ConfigError: if any of them is invalid; lists all faults of one.
    """
    if isinstance(value, os.PathLike):
        return DatasetSpec("ImageDataset", (_expand(os.fspath(value)),))
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, Mapping):
        return _parse_part(value).spec
    if isinstance(value, Sequence):
        return _combine([_parse_part(one) for one in value])
    raise ConfigError(f"{KEY}: expected a path, a dataset string, a mapping or a list of them, got {value!r}")


def _combine(parts: list[Part]) -> DatasetSpec:
    """Make one spec from a list: plain folders form one collection, anything else a mixture."""
    if not parts:
        raise ConfigError(f"{KEY}: expected folders of images, got an empty list")
    without = [part.name for part in parts if part.weight is None]
    if 0 < len(without) < len(parts):
        raise ConfigError(f"{KEY}: expected a weight for all or for none, got none for {', '.join(without)}")
    if len(parts) == 1:
        return parts[0].spec
    if without and all(part.spec.kind == "ImageDataset" for part in parts):
        return DatasetSpec("ImageDataset", tuple(root for part in parts for root in part.spec.roots))
    if any(inner.weight is not None for part in parts for inner in part.spec.parts):
        raise ConfigError(f"{KEY}: expected weights at one level, got weights inside of weights; multiply them out")
    return DatasetSpec("Mixture", parts=tuple(parts))


def _parse_part(value: Any) -> Part:
    if not isinstance(value, Mapping):
        is_text = isinstance(value, str | os.PathLike)  # Python 3.10 does not accept Text here
        return Part(parse_dataset(value), None, os.fspath(value) if is_text else repr(list(value)))
    content = {str(key): one for key, one in value.items() if one is not None}
    weight, name, kind = content.pop("weight", None), content.pop("name", None), content.pop("kind", None)
    legal = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight > 0
    if weight is not None and not legal:
        raise ConfigError(f"{KEY}: {dict(value)}: weight: expected a number above 0, got {weight!r}")
    spec = _parse_mapping(dict(value), kind, content)
    places = ", ".join(spec.roots or [part.name for part in spec.parts])
    return Part(spec, weight, str(name) if name is not None else places)


def _parse_mapping(value: dict[str, Any], kind: str | None, content: dict[str, Any]) -> DatasetSpec:
    """Parse the keys of a mapping except weight and name."""
    if kind is None and len(content) == 1 and set(content) <= {"path", "root"}:
        return parse_dataset(next(iter(content.values())))
    if kind is None:
        place = str(content.get("path", content.get("root", "")))
        if not place:
            raise ConfigError(f"{KEY}: {value}: path: missing (expected path: <folder or file>)")
        kind = _kind_of_path(place)
    if kind not in KINDS:
        raise _unknown(str(kind), value)
    listed = {key: _listed(one) for key, one in content.items()}
    return _make(str(value), kind, [(key, str(one)) for key, ones in listed.items() for one in ones])


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _parse_text(text: str) -> DatasetSpec:
    if not text.strip():
        raise ConfigError(f"{KEY}: expected a folder of images, got nothing; set it to your folder")
    if os.path.exists(os.path.expanduser(text)) or _looks_like_path(text):
        return _path(text)
    if _URL.match(text):
        raise ConfigError(f"{KEY}: expected a folder on this machine, got {text}; download or mount it")
    name, colon, rest = text.partition(":")
    if name in KINDS:
        return _make(text, name, *_options(colon + rest))
    near = name in CELL_KINDS or (not colon and difflib.get_close_matches(name, KINDS, n=1, cutoff=0.8))
    if near or re.match(r"\w+=", rest):
        raise _unknown(name, text)
    return _path(text)


def _unknown(name: str, where: Any) -> ConfigError:
    if name in CELL_KINDS:
        return ConfigError(
            f"{KEY}: {name}, upstream's dataset of cell images in {str(where)!r}, is not here; give a folder of RGB "
            f"images, or one of the kinds {', '.join(KINDS)}"
        )
    near = difflib.get_close_matches(name, KINDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}"
    return ConfigError(f"{KEY}: unknown dataset {name!r} in {str(where)!r}; {hint}")


def _unknown_key(key: str, allowed: Sequence[str]) -> str:
    why = "a key of upstream's cell images, which are not here" if key in CELL_KEYS else "unknown key"
    return f"{key}: {why} (there are {', '.join(allowed)})"


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../")) or _WINDOWS_PATH.match(text) is not None


def _path(text: str) -> DatasetSpec:
    return DatasetSpec(_kind_of_path(text), (_expand(text),))


def _kind_of_path(text: str) -> str:
    """Return the kind by the suffix; any existing folder is a folder of images, regardless of its name."""
    if os.path.isdir(os.path.expanduser(text)):
        return "ImageDataset"
    return next((kind for suffix, kind in KIND_OF_SUFFIX.items() if text.lower().endswith(suffix)), "ImageDataset")


def _expand(text: str) -> str:
    return str(Path(os.path.expanduser(text)))


def _options(rest: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Parse ``:key=value:key="value"`` (a trailing colon is allowed) into (pairs, faults)."""
    pairs, position = [], 0
    rest = rest[:-1] if rest.endswith(":") else rest
    while position < len(rest):
        match = _OPTION.match(rest, position)
        if match is None or (match.end() < len(rest) and rest[match.end()] != ":"):
            wrong = f"cannot read {rest[position:]!r} (expected :key=value, values with ':' in double quotes)"
            return pairs, [wrong]
        value = next(match[group] for group in ("double", "single", "plain") if match[group] is not None)
        pairs.append((match["key"], value))
        position = match.end()
    return pairs, []


def _make(text: str, kind: str, pairs: Iterable[tuple[str, str]], wrong: Sequence[str] = ()) -> DatasetSpec:
    """Make the spec of a known kind from its options."""
    allowed, kind = KINDS[kind], ALIASES.get(kind, kind)
    place, other = ("path", "root") if "path" in allowed else ("root", "path")
    pairs = [(place if key == other and other not in allowed else key, value) for key, value in pairs]
    keys = [key for key, _ in pairs]
    wrong = [*wrong, *(_unknown_key(key, allowed) for key in keys if key not in allowed)]
    repeated = {key for key in keys if keys.count(key) > 1 and not (key == place and kind in SEVERAL)}
    wrong += [f"{key}: given more than once" for key in sorted(repeated)]
    wrong += [f"{key}: empty" for key, value in pairs if not value]
    given = dict(pairs)
    if place not in given:
        wrong.append(f"{place}: missing (expected {place}=<folder>)")
    if kind == "ImageNet" and given.get("split") not in SPLITS:
        wrong.append(f"split: expected {', '.join(SPLITS)}, got {given.get('split', 'nothing')}")
    if wrong:
        raise ConfigError(f"{KEY}: {text!r}: " + "; ".join(wrong))
    expanded = [(key, _expand(value) if key in PATHS else value) for key, value in pairs]
    roots = tuple(value for key, value in expanded if key == place)
    return DatasetSpec(kind, roots, {key: value for key, value in expanded if key != place})
