"""Choose the output directory of a run and tell early whether it can be written.

Not its creation: the run does that. Read `resolve_output_dir` first.
"""

import contextlib
import datetime
import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dinov2_custom.errors import ConfigError


def resolve_output_dir(argument: str | None, configured: str | None, now: datetime.datetime | None = None) -> str:
    """Return as absolute path `argument` (--output-dir), else `configured` (train.output_dir), else a dated one.

    The default is outputs/<yyyy-mm-dd_hh-mm-ss> of `now` (the present) below the working directory, with _2 and so on
    if that exists. With several processes let one of them choose and tell the others.
    """
    chosen = argument or configured
    if not chosen:
        chosen = numbered(Path(f"outputs/{now or datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"))
    return str(Path(chosen).expanduser().absolute())


def numbered(path: Path) -> Path:
    """Return ``path``, or the first of ``path_2``, ``path_3``, ... that is not there."""
    names = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


def missing_folders(folder: Path) -> list[Path]:
    """Return ``folder`` and those above it that do not exist, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of ``folders``, innermost first, that are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_output_dir(path: str | Path, flags: str = "--output-dir or train.output_dir") -> None:
    """Check that files can be made in `path`, or in its nearest existing parent if it does not exist yet.

    A temporary folder is made there and removed again, since permission bits say too little (read-only mounts, root).

    Raises:
        ConfigError: something that is no folder is in the way, or nothing can be written there.
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
