"""Save and restore the complete state of a run: written atomically, read without unpickling code.

Each process writes and reads the rows that it holds, so a run can be resumed with any number of processes, sharded or
not.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import nn

from dinov2_custom import __version__, distributed
from dinov2_custom.errors import CheckpointError, reason_of, remedy
from dinov2_custom.train.checkpoint_store import CheckpointStore, folder_name, set_aside
from dinov2_custom.train.teacher_file import save_atomically, save_teacher, teacher_path, teacher_weights
from dinov2_custom.train.training_state import own_pieces, restore
from dinov2_custom.utils.checkpoint_folder import StoredState, Written, file_of_rank, write_pieces
from dinov2_custom.utils.run_folder import how_to_gather, upstream_shards

__all__ = ["Checkpointer", "Resumed", "has_checkpoints", "save_teacher", "set_aside"]
logger = logging.getLogger("dinov2")


class Resumed(NamedTuple):
    """The state a run continues from: the last completed ``iteration``, the number of the next draw (None: not stored),
    and all other values of the checkpoint besides tensors."""

    iteration: int
    draws: int | None
    values: dict[str, Any]


class Checkpointer:
    """Save and restore a run's state in ``folder``. All processes call every method.

    Args:
        model, optimizer, scaler: restored in place by :meth:`load_latest`; ``scaler`` may be None.
        keep_last: how many periodic checkpoints are kept; older ones are removed after a new one is complete.
        keep_every: keep a checkpoint permanently every so many iterations; 0: none.
        on_error: ``warn`` keeps the previous checkpoint and continues if a new one cannot be written; ``stop`` raises.
        async_save: copy the state and write it while training continues; errors are raised at the next save.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler=None,
        keep_last: int = 3,
        keep_every: int = 0,
        on_error: str = "stop",
        async_save: bool = False,
    ) -> None:
        self.folder, self.model, self.optimizer, self.scaler = Path(folder), model, optimizer, scaler
        self.on_error, self.async_save = on_error, async_save
        self.store = CheckpointStore(self.folder, keep_last, keep_every)
        self._group = distributed.second_group() if async_save else None
        self._writing: threading.Thread | None = None
        self._outcome: tuple[Path, str | None] | Exception = (self.folder, None)
        self._failures: Counter[str] = Counter()  # reason -> count

    def save(
        self,
        iteration: int,
        *,
        final: bool = False,
        wait: bool = False,
        draws: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        """Write the state after ``iteration`` (0-based, completed) and return its path.

        No process returns before the checkpoint is complete; with ``async_save``, :meth:`wait` gives that guarantee.

        Args:
            draws: the number of the next draw.
            extra: plain values to store, by name.

        Raises:
            CheckpointError: this checkpoint, or with ``async_save`` the previous one, cannot be written, and
                ``on_error`` is ``stop`` or it is the last one; the previous checkpoint is intact.
        """
        self.wait()
        self._check_there()
        for loss in (self.model.dino_loss, self.model.ibot_patch_loss):
            loss.apply_center_update()
        aside = self.async_save and not (final or wait)
        pieces = own_pieces(self.model, self.optimizer, copy=aside)
        values = {**self._values(iteration, draws), **(extra or {})}
        path = self.folder / folder_name(iteration, final)
        if not aside:
            written, trouble = self._write(pieces, values, path, final)
            self._report(path, trouble, required=final)
            if self._failures and (final or wait):
                counts = ", ".join(f"{count} x {reason}" for reason, count in self._failures.items())
                logger.warning(f"checkpoints and teachers that could not be written: {counts}")
            return written or path

        self._write_aside(path, lambda: self._write(pieces, values, path, final)[1])
        return path

    def _write_aside(self, path: Path, write: Callable[[], str | None]) -> None:
        """Call ``write``, which returns the reason of a failure, in a thread; :meth:`wait` reports the outcome."""

        def run() -> None:
            try:
                self._outcome = path, write()
            except Exception as e:  # an exception in this thread would be lost
                self._outcome = e

        self._writing = threading.Thread(target=run, name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Wait for a checkpoint or teacher that is being written.

        Raises:
            CheckpointError: it could not be written and ``on_error`` is ``stop``.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing, outcome = None, self._outcome
            if isinstance(outcome, Exception):
                raise outcome
            self._report(*outcome, required=False)

    def close(self) -> None:
        """Wait for a checkpoint that is being written, log a warning if it fails, and release the process group."""
        try:
            self.wait()
        except Exception as e:  # the process is ending, often because of a more important error
            logger.warning(f"the checkpoint that was being written is not complete: {reason_of(e)}")
        self._group = None  # otherwise its threads stay alive wherever an error refers to this object

    def save_teacher(self, name: str, *, final: bool = False, facts: Mapping[str, Any] | None = None) -> Path:
        """Write the teacher as :func:`save_teacher` does, with the errors and synchronisation of :meth:`save`.

        Args:
            facts: plain values to store beside the key ``teacher``.
        """
        self.wait()  # the writer thread and this one may not use collectives at the same time
        self._check_there()
        aside = self.async_save and not final
        path, teacher = teacher_path(self.folder, name), teacher_weights(self.model, copy=aside)

        def write() -> str | None:
            return self._on_main(lambda: save_atomically({**teacher, **(facts or {})}, path))[1]

        if aside:
            self._write_aside(path, write)
        else:
            self._report(path, write(), required=final)
        return path

    def load_latest(self) -> Resumed | None:
        """Restore the newest readable checkpoint and return its state, or None if there is none.

        Raises:
            CheckpointError: checkpoints exist but none is readable, or the newest is of another architecture.
        """
        candidates, trouble = self._on_main(self.store.to_try)
        if trouble:
            raise CheckpointError(
                f"resume: expected a readable folder {self.folder}, got {trouble}; check its permissions"
            )
        for path in candidates:
            opened: list[StoredState] = []
            _, trouble = self._everywhere(lambda path=path, opened=opened: opened.append(self._open(path)))
            if trouble:
                logger.warning(f"skipped an unreadable checkpoint, using the one before: {trouble}")
                continue
            restore(self.model, self.optimizer, opened[0], path)
            values = opened[0].values
            if self.scaler is not None and values.get("scaler"):
                self.scaler.load_state_dict(values["scaler"])
            logger.info(f"resumed from={path} iteration={values['iteration']}")
            return Resumed(values["iteration"], values.get("draws"), values)
        if candidates:
            raise CheckpointError(
                f"resume: expected a readable checkpoint, got {len(candidates)} unreadable ones in {self.folder}; "
                "start over with --no-resume"
            )
        return None

    def _check_there(self) -> None:
        lost, _ = self._on_main(self.store.describe_loss)
        if lost:  # regardless of ``on_error``: later files would go nowhere, or to the wrong place
            raise CheckpointError(lost)

    def newest(self) -> str:
        """Return the name of the newest complete checkpoint, or "none"."""
        return self.store.last() or "none"

    def _open(self, path: Path) -> StoredState:
        state = StoredState(path)
        state.verify(distributed.get_global_rank(), distributed.get_global_size())
        return state

    def _values(self, iteration: int, draws: int | None) -> dict[str, Any]:
        config = OmegaConf.to_container(self.model.cfg)
        return {
            "iteration": iteration,
            "draws": draws,
            "seed": config["train"]["seed"],  # all random numbers are functions of it and of the two values above
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "world_size": distributed.get_global_size(),
            "saved_at": time.time(),
            "versions": {"dinov2_custom": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "config": config,
        }

    def _write(self, pieces: dict, values: dict[str, Any], path: Path, final: bool) -> tuple[Path | None, str | None]:
        """Write a checkpoint; return its path, or the reason of the failure."""
        if final and self._on_main(self.store.has_final)[0]:  # its successor has to be complete first
            complete, trouble = self._write(pieces, values, path, final=False)
            if complete is None:
                return None, trouble
            self._on_main(self.store.remove_final)
        folder, trouble = self._on_main(lambda: self.store.begin(values["iteration"], final))
        if trouble:
            return None, trouble

        def write_own() -> dict[str, Written]:
            name = file_of_rank(distributed.get_global_rank())
            folder.mkdir(exist_ok=True, parents=True)
            return {name: write_pieces(folder / name, pieces)} if pieces else {}

        complete = None
        written, trouble = self._everywhere(write_own)
        if trouble is None:
            files = {name: one for own in written for name, one in own.items()}
            complete, trouble = self._on_main(lambda: self._commit(folder, files, values))
        if trouble:
            self._on_main(lambda: self.store.abandon(folder))
        return complete, trouble

    def _commit(self, folder: Path, files: dict[str, Written], values: dict[str, Any]) -> Path:
        complete = self.store.commit(folder, files, values)
        try:
            self.store.tidy(complete, values["iteration"])
        except OSError as e:
            logger.warning(f"could not remove an old checkpoint: {e}")
        return complete

    def _story(self, path: Path, trouble: str) -> str:
        newest = self.newest()
        what = f"; {remedy(trouble)}, then the same command"
        kept = f"the newest complete one ({newest}) is intact{what} resumes from it"
        none = f"there is no earlier one{what} starts over"
        return f"checkpoint: expected to write {path}, got {trouble}; {none if newest == 'none' else kept}"

    def _report(self, path: Path, trouble: str | None, required: bool) -> None:
        """Raise, or warn on the first occurrence of this ``trouble``, and count it."""
        if not trouble:
            return
        if required or self.on_error == "stop":
            raise CheckpointError(self._story(path, trouble))
        self._failures[trouble] += 1
        if self._failures[trouble] == 1:
            logger.warning(f"{self._story(path, trouble)}; training continues; this is logged once")

    def _on_main(self, action: Callable[[], Any]) -> tuple[Any, str | None]:
        """Run ``action`` in the main process; return, in all processes, its result or the reason of the failure."""
        return distributed.gather_objects(_try(action) if distributed.is_main_process() else None, self._group)[0]

    def _everywhere(self, action: Callable[[], Any]) -> tuple[list[Any], str | None]:
        """Run ``action`` in all processes; return, in all of them, all results and the first failure."""
        outcomes = distributed.gather_objects(_try(action), self._group)
        return [value for value, _ in outcomes], next((trouble for _, trouble in outcomes if trouble), None)


def has_checkpoints(folder: Path) -> bool:
    """Return whether ``folder`` holds a checkpoint, readable or not; all processes get the main process's answer.

    Raises:
        CheckpointError: all checkpoints are facebookresearch/dinov2's; a run of this package would start at 0 beside
            them.
    """
    found = bool(CheckpointStore(folder, 1, 0).complete())
    found, foreign = distributed.broadcast_object((found, [] if found else upstream_shards(folder)))
    if foreign:
        raise CheckpointError(
            f"--output-dir: expected an empty directory or a run of dinov2_custom, got {folder} with a run of "
            f"facebookresearch/dinov2 ({foreign[-1].name}); {how_to_gather(folder)}; or start over with --no-resume"
        )
    return found


def _try(action: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return action(), None
    except OSError as e:
        return None, e.strerror or str(e)
    except CheckpointError as e:
        return None, str(e)
