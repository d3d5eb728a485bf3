"""Everything a run needs to go on, on disk: written whole or not at all, and read without unpickling code.

A checkpoint ``model_<iteration>.pth`` is written under a temporary name, flushed, renamed, and only then named in
``last_checkpoint``. Loading takes the newest that is readable. Read :class:`Checkpointer` first.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2_custom import distributed
from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils.weights import read_weights

logger = logging.getLogger("dinov2")
_NAME = re.compile(r"model_(\d{7,}|final)\.pth")
FORMAT = 1
_OWN_KEYS = ("format", "iteration", "model", "optimizer", "scaler")


def save_atomically(obj: Any, path: Path) -> None:
    """Write ``obj`` with ``torch.save`` so that ``path`` is either absent, the old file or the whole new one.

    Raises:
        OSError: it cannot be written; nothing is left of the attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            try:
                torch.save(obj, file)
            except RuntimeError as e:  # torch's writer on a write that failed, for example on a full disk
                raise e.__context__ if isinstance(e.__context__, OSError) else OSError(str(e)) from e
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Checkpointer:
    """Save and restore a run's state in ``folder``.

    Args:
        model, optimizer, scaler: restored in place by :meth:`load_latest`; ``scaler`` may be None.
        keep_last: how many periodic checkpoints stay; older ones are removed after a new one is complete.
        keep_every: those of every so many iterations stay for good; 0 for none.
        on_error: ``warn`` goes on with the checkpoint before when a new one cannot be written, ``stop`` raises.

    Attributes:
        extra: what :meth:`save` was given as such, after :meth:`load_latest`.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer,
        scaler=None,
        keep_last: int = 3,
        keep_every: int = 0,
        on_error: str = "stop",
    ) -> None:
        self.folder, self.model, self.optimizer, self.scaler = Path(folder), model, optimizer, scaler
        self.keep_last, self.keep_every, self.on_error = keep_last, keep_every, on_error
        self.extra: dict[str, Any] = {}

    def save(self, iteration: int, *, final: bool = False, extra: dict[str, Any] | None = None) -> Path:
        """Write the state after ``iteration`` (0-based, done) and return its path.

        All ranks call it; the first writes and the others wait, so that none leaves, or starts to read, before the file
        is complete.

        Raises:
            CheckpointError: it cannot be written and ``on_error`` is ``stop`` or it is the last one; the one before is
                intact.
        """
        for loss in (self.model.dino_loss, self.model.ibot_patch_loss):
            loss.apply_center_update()
        path = self.folder / ("model_final.pth" if final else f"model_{iteration:07d}.pth")
        self._write_on_main(lambda: self._write(path, iteration, extra or {}), path, required=final)
        return path

    def save_teacher(self, name: str, *, final: bool = False) -> Path:
        """Write the teacher as :func:`save_teacher` does, with the errors and the waiting of :meth:`save`."""
        path = teacher_path(self.folder, name)
        self._write_on_main(lambda: save_teacher(self.model, self.folder, name), path, required=final)
        return path

    def _write_on_main(self, write: Callable[[], Any], path: Path, required: bool) -> None:
        trouble = None
        if distributed.is_main_process():
            try:
                write()
            except OSError as e:
                trouble = (
                    f"checkpoint: expected to write {path}, got {e.strerror or e}; the newest complete one "
                    f"({self.newest()}) "
                    "is intact; make room, then the same command goes on from it"
                )
        trouble = distributed.broadcast_object(trouble)  # all ranks wait here, and stop or go on together
        if trouble and (required or self.on_error == "stop"):
            raise CheckpointError(trouble)
        if trouble:
            logger.warning(f"{trouble}; training goes on")

    def _write(self, path: Path, iteration: int, extra: dict[str, Any]) -> None:
        state = {
            "format": FORMAT,
            "iteration": iteration,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            **extra,
        }
        save_atomically(state, path)
        (self.folder / "last_checkpoint.tmp").write_text(path.name)
        os.replace(self.folder / "last_checkpoint.tmp", self.folder / "last_checkpoint")
        self._prune()

    def load_latest(self) -> int | None:
        """Restore the newest readable checkpoint; return its iteration, or None when there is none.

        Raises:
            CheckpointError: checkpoints exist but none is readable, or the newest is of another architecture.
        """
        candidates = self.candidates()
        for path in candidates:
            try:
                state = read_weights(path)
            except CheckpointError as e:
                logger.warning(f"skipped an unreadable checkpoint, falling back to the one before: {e}")
                continue
            self._restore(state, path)
            self.extra = {key: value for key, value in state.items() if key not in _OWN_KEYS}
            logger.info(f"resumed from={path} iteration={state['iteration']}")
            return state["iteration"]
        if candidates:
            raise CheckpointError(
                f"resume: expected a readable checkpoint, got {len(candidates)} unreadable ones in {self.folder}; "
                "start afresh with --no-resume"
            )
        return None

    def newest(self) -> str:
        """Return the name of the newest complete checkpoint, or "none"."""
        last = self.folder / "last_checkpoint"
        return last.read_text() if last.exists() else "none"

    def candidates(self) -> list[Path]:
        """Return the checkpoint files, newest first; the one named in ``last_checkpoint`` leads."""
        found = self._periodic()
        if (final := self.folder / "model_final.pth").exists():
            found.append(final)
        marker = self.folder / "last_checkpoint"
        last = marker.read_text().strip() if marker.exists() else ""
        return sorted(found, key=lambda p: (p.name == last, p.stat().st_mtime_ns, p.name), reverse=True)

    def _periodic(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [p for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name)) and m[1] != "final"]

    def _prune(self) -> None:
        for old in sorted(self._periodic(), reverse=True)[self.keep_last :]:
            done = int(_NAME.fullmatch(old.name)[1]) + 1
            if not self.keep_every or done % self.keep_every:
                old.unlink()

    def _restore(self, state: dict, path: Path) -> None:
        if missing := [key for key in ("iteration", "model", "optimizer") if key not in state]:
            raise CheckpointError(f"resume: expected a training checkpoint, got no {', '.join(missing)} in {path}")
        check_same_architecture(self.model, state["model"], path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


def check_same_architecture(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: they differ; names the first differences and both shapes.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differences = [
        f"{name}: expected {own.get(name, 'nothing')}, got {got.get(name, 'nothing')}"
        for name in [*own, *(n for n in got if n not in own)]
        if own.get(name) != got.get(name)
    ]
    if differences:
        shown = "\n  ".join(differences[:5])
        raise CheckpointError(
            f"resume: the checkpoint is of another architecture, {len(differences)} of {len(own)} tensors differ "
            f"in {path}:\n  {shown}\nuse the run's own config.yaml, another --output-dir, or --no-resume"
        )


def teacher_path(folder: Path, name: str) -> Path:
    return Path(folder) / "eval" / name / "teacher_checkpoint.pth"


def save_teacher(model: nn.Module, folder: Path, name: str) -> Path:
    """Write ``eval/<name>/teacher_checkpoint.pth``, upstream's layout: {"teacher": {backbone.*, dino_head.*, ...}}."""
    path = teacher_path(folder, name)
    if not distributed.is_main_process():
        return path
    teacher = {key: tensor.detach().float().cpu().clone() for key, tensor in model.teacher.state_dict().items()}
    save_atomically({"teacher": teacher}, path)
    return path


def set_aside(folder: Path, clock: Callable[[], str]) -> Path | None:
    """Move a former run's files in ``folder`` to ``previous_<clock()>`` there; return that, None if there were none."""
    names = ("last_checkpoint", "training_metrics.json", "config.yaml", "bad_images.jsonl", "eval", "logs")
    old = [p for p in folder.iterdir() if p.name in names or _NAME.fullmatch(p.name)] if folder.is_dir() else []
    if not old:
        return None
    target = folder / f"previous_{clock()}"
    target.mkdir()
    for path in old:
        os.replace(path, target / path.name)
    return target
