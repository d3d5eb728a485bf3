"""Paths of a run: its output directory and the paths in its configuration. Imports neither omegaconf nor pydantic."""

import contextlib
import datetime
import itertools
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dinov2_custom.errors import ConfigError

KEYS = ("train.dataset_path", "train.path_preserved", "student.pretrained_weights", "MODEL.WEIGHTS")
_NAMES = ("root", "path", "extra")  # dataset options that are paths
_OPTION = re.compile(r"""(:(?:root|path|extra)=)("[^"]*"|'[^']*'|[^:]*)""")
_DATASET = re.compile(r"\w+:\w+=")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def resolve_output_dir(argument: str | None, configured: str | None, now: datetime.datetime | None = None) -> str:
    """Return the absolute path of `argument` (--output-dir), else `configured` (train.output_dir), else a dated one.

    The default is outputs/<yyyy-mm-dd_hh-mm-ss> of `now` (default: the current time) below the working directory, with
    _2 and so on if that exists. With several processes, one of them must choose and broadcast the path.
    """
    chosen = argument or configured
    if not chosen:
        chosen = numbered(Path(f"outputs/{now or datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"))
    return str(Path(chosen).expanduser().absolute())


def numbered(path: Path) -> Path:
    """Return ``path``, or the first of ``path_2``, ``path_3``, ... that does not exist."""
    names = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


def missing_folders(folder: Path) -> list[Path]:
    """Return ``folder`` and its parents as far as they do not exist, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove the empty ones of ``folders``, given innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_output_dir(path: str | Path, flags: str = "--output-dir or train.output_dir") -> None:
    """Check that files can be created in `path`, or in its nearest existing parent if it does not exist yet.

    This creates and removes a temporary folder, since permission bits are insufficient (read-only mounts, root).

    Raises:
        ConfigError: if the path is not a folder, or nothing can be written there.
    """
    folder = Path(path).expanduser().absolute()
    advice = f"choose another with {flags}"
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists() or parent.is_symlink())
    if not nearest.is_dir():
        kind = "a file" if nearest.is_file() else "no folder"
        raise ConfigError(f"output directory {folder}: expected a folder, got {nearest}, which is {kind} -> {advice}")
    try:
        with tempfile.TemporaryDirectory(prefix=".write_test_", dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(
            f"output directory {folder}: expected a writable place, got {error.strerror} in {nearest} -> {advice}"
        ) from error


def with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values`, by dotted key, with relative paths to existing files made absolute."""
    return {key: _absolute(value) if key in KEYS else value for key, value in values.items()}


def absent(value: Any) -> list[str]:
    """Return the paths in `value` (of one of `KEYS`, or a dataset string) that do not exist on this machine."""
    if isinstance(value, list):
        return [path for one in value for path in absent(one)]
    if isinstance(value, dict):
        return [path for name in _NAMES for path in absent(value.get(name))]
    if not isinstance(value, str) or os.sep not in value or _URL.match(value) or _absolute(value) != value:
        return []
    if Path(value).expanduser().exists():
        return []
    if _DATASET.match(value):
        return [path for _, text in _OPTION.findall(value) for path in absent(text.strip("\"'"))]
    return [] if _is_pattern(value) else [value]


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    if isinstance(value, dict):
        return {key: _absolute(one) if key in _NAMES else one for key, one in value.items()}
    if not isinstance(value, str) or not value or _URL.match(value):
        return value
    path = Path(value).expanduser()
    if not path.exists() and _DATASET.match(value):
        return _OPTION.sub(_absolute_option, value)
    return str(path.absolute()) if path.exists() or _is_pattern(str(path)) else value


def _is_pattern(path: str) -> bool:
    """Return whether ``path`` is a pattern below an existing folder."""
    fixed = re.match(r"[^{*?[]*", path)[0]
    return fixed != path and os.path.isdir(os.path.dirname(fixed) or ".")


def _absolute_option(option: re.Match) -> str:
    text = option[2]
    quote = text[:1] if text[:1] in ("'", '"') else ""
    plain = _absolute(text.strip(quote) if quote else text)
    if not quote and text != plain and (":" in plain or "=" in plain):
        quote = '"'  # needed because of the working directory's name
    return f"{option[1]}{quote}{plain}{quote}"
