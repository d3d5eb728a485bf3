"""Output folders that belong to one command and are locked by one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dinov2_custom import files
from dinov2_custom.errors import ConfigError

LOCK = ".lock"


@contextlib.contextmanager
def own_folder(folder: str | os.PathLike, marker: str) -> Iterator[Path]:
    """Create ``folder``, or reuse one with the file ``marker`` of an earlier run, and lock it during the body.

    Raises:
        ConfigError: if the folder contains other files, cannot be created, or is in use by another process.
    """
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
        stack = contextlib.ExitStack()
        stack.enter_context(files.locked(path / LOCK))
    except files.LockedError as e:
        raise ConfigError(
            f"--output-dir: expected a folder that no other process uses, got {path}; wait for that process, or choose "
            "another"
        ) from e
    except OSError as e:
        raise ConfigError(
            f"--output-dir: expected a folder to write to, got {path} ({e.strerror}); choose another"
        ) from e
    with stack:
        if others and marker not in others:
            raise ConfigError(
                f"--output-dir: expected an empty folder or one that this command has written, got {path} with "
                f"{', '.join(others[:5])}; nothing was changed, choose another"
            )
        (path / marker).touch()
        yield path


def default_folder(command: str, dataset: Sequence[str]) -> str:
    """Return ``./outputs/<command>_<last part of the dataset>_<hash>``, the same for the same dataset."""
    text = "\n".join(os.path.abspath(os.path.expanduser(one)) if os.path.exists(one) else one for one in dataset)
    last = re.sub(r"[^\w.-]+", "_", re.split(r"[/\\:=]", dataset[0].rstrip("/\\:"))[-1]) or "dataset"
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return os.path.join("outputs", f"{command}_{last}_{digest[:8]}")
