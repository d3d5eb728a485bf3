"""The checkpoints in a run directory: which are complete, how one is committed, which are removed.

``model_<iteration>/`` or ``model_final/`` is written under another name, flushed, renamed, and declared complete by a
marker written last. The file system must support renaming and read-after-write; where it cannot flush, sizes and
checksums detect damage. Only the main process calls this module.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinov2_custom.configs.paths import numbered
from dinov2_custom.errors import CheckpointError
from dinov2_custom.files import write_text
from dinov2_custom.utils.checkpoint_folder import Written, flush_folder, read_marker, write_marker
from dinov2_custom.utils.run_folder import LAST, LOCK, MARKER, is_complete, last_checkpoint

logger = logging.getLogger("dinov2")
FINAL = "model_final"
_NAME = re.compile(r"model_(\d{7,}|final)")
_OF_UPSTREAM = re.compile(r"(model_(\d{7,}|final)|last_checkpoint)\.rank_\d+(\.pth)?")
_UNFINISHED = re.compile(r"model_(\d{7,}|final)\.tmp")
_RUN_FILES = (LAST, "training_metrics.json", "config.yaml", "bad_images.jsonl", "eval", "logs")


def folder_name(iteration: int, final: bool = False) -> str:
    return FINAL if final else f"model_{iteration:07d}"


class CheckpointStore:
    """Keep the newest ``keep_last`` periodic checkpoints in ``folder`` plus one every ``keep_every`` iterations."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int) -> None:
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self._lock = self.folder / LOCK
        self._is_locked = self._lock.exists()

    def describe_loss(self) -> str:
        """Return a sentence if the run directory was renamed, removed or emptied during the run, else "".

        This checks the run's lock file: other parts of the run may create the directory again.
        """
        if not self._is_locked or self._lock.exists():
            return ""
        return (
            f"expected the run directory {self.folder} with this run's files, got none: it was renamed, removed or "
            "emptied during the run; restore it, then the same command resumes from its newest checkpoint"
        )

    def complete(self) -> list[Path]:
        """Return the checkpoints that look complete, newest first, in the order they were written."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and is_complete(p)]
        return sorted(found, key=_age, reverse=True)

    def to_try(self) -> list[Path]:
        """Return :meth:`complete`, with a warning when ``last_checkpoint`` names none of them."""
        found, last = self.complete(), self.last()
        if last and last not in {p.name for p in found}:
            logger.warning(f"{LAST} names {last}, which is missing or incomplete: using the one before")
        return found

    def last(self) -> str:
        """Return the content of ``last_checkpoint``, or "" if there is none."""
        return last_checkpoint(self.folder)

    def begin(self, iteration: int, final: bool) -> Path:
        """Remove leftovers of earlier attempts and return the empty folder to write to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if _UNFINISHED.fullmatch(path.name) or (
                path.is_dir() and _NAME.fullmatch(path.name) and not is_complete(path)
            ):
                _remove(path)
        name = folder_name(iteration, final)
        path = self.folder / f"{name}.tmp"
        path.mkdir()
        return path

    def commit(self, path: Path, files: dict[str, Written], values: dict[str, Any]) -> Path:
        """Declare the checkpoint written to ``path`` complete and return its final path.

        Raises:
            OSError: this failed; earlier checkpoints are intact.
            CheckpointError: files written by other processes are missing here.
        """
        if missing := [name for name in files if not (path / name).is_file()]:
            raise CheckpointError(
                f"expected {', '.join(missing)} of other processes in {path}, got none; use a folder that all nodes "
                "share"
            )
        flush_folder(path)
        target = path.with_name(path.name.removesuffix(".tmp"))
        _remove(target)
        os.rename(path, target)
        flush_folder(self.folder)
        number = 1 + max((_number(p) or 0 for p in self.complete()), default=0)
        write_marker(target, files, {"number": number, **values})
        return target

    def tidy(self, newest: Path, iteration: int) -> None:
        """Remove the checkpoints that the new one supersedes and name it in ``last_checkpoint``."""
        if newest.name == FINAL:
            _remove(self.folder / folder_name(iteration))  # same name, written to replace an earlier final one
        periodic = [p for p in self.complete() if not p.name.startswith(FINAL)]
        periodic.sort(key=lambda p: p != newest and _number(p) is None)  # unreadable ones are removed first
        for old in periodic[self.keep_last :]:
            done = int(_NAME.fullmatch(old.name)[1]) + 1
            if not self.keep_every or done % self.keep_every:
                _remove(old)
        write_text(self.folder / LAST, newest.name)

    def abandon(self, path: Path) -> None:
        """Remove the files of a failed attempt."""
        for left in (path, path.with_name(path.name.removesuffix(".tmp"))):
            if not is_complete(left):
                _remove(left)

    def has_final(self) -> bool:
        """Return whether a complete final checkpoint of an earlier, shorter run exists."""
        return is_complete(self.folder / FINAL)

    def remove_final(self) -> None:
        """Remove the final checkpoint, to make room for another, which the caller has written under another name."""
        _remove(self.folder / FINAL)


def set_aside(folder: Path, clock: Callable[[], str]) -> Path | None:
    """Move a former run's files in ``folder`` to ``previous_<clock()>`` there; return that path, or None.

    If that exists (another start in the same second), the name is ``previous_<clock()>_2`` and so on.
    """
    paths = folder.iterdir() if folder.is_dir() else ()
    old = [p for p in paths if p.name in _RUN_FILES or _NAME.fullmatch(p.name) or _OF_UPSTREAM.fullmatch(p.name)]
    if not old:
        return None
    target = numbered(folder / f"previous_{clock()}")
    target.mkdir()
    for path in old:
        os.replace(path, target / path.name)
    return target


def _number(path: Path) -> int | None:
    """Return a checkpoint's number in its run, which does not depend on a clock; None for a torn marker."""
    try:
        return read_marker(path).get("number")
    except CheckpointError:
        return None


def _age(path: Path) -> float:
    """Return a sort key for checkpoints, newest last; torn markers sort first, so that a warning names them."""
    number = _number(path)
    return math.inf if number is None else number


def _remove(path: Path) -> None:
    """Remove a checkpoint, marker first: one removed halfway is incomplete."""
    if path.is_dir() and not path.is_symlink():
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
