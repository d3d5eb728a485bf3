"""Checkpoints of the training of linear classifiers, under upstream's names, written atomically."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dinov2_custom import distributed
from dinov2_custom.errors import CheckpointError, remedy
from dinov2_custom.files import write_text
from dinov2_custom.train.checkpoint import save_atomically
from dinov2_custom.utils.checkpoint_folder import check_whole
from dinov2_custom.utils.run_folder import last_checkpoint
from dinov2_custom.utils.weights import read_weights

logger = logging.getLogger("dinov2")


class LinearCheckpointer:
    """Save and restore classifiers, optimizer, schedule and iteration in ``folder``."""

    def __init__(self, model: nn.Module, folder: str | os.PathLike, optimizer: Any, scheduler: Any) -> None:
        self.model, self.folder, self.optimizer, self.scheduler = model, Path(folder), optimizer, scheduler

    def save(self, name: str, iteration: int) -> None:
        """Write ``<name>.pth`` on the main process, after ``iteration`` (0-based) and record it as the last."""
        if not distributed.is_main_process():
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "iteration": iteration,
        }
        try:
            save_atomically(state, self.folder / f"{name}.pth")
            write_text(self.folder / "last_checkpoint", f"{name}.pth")
        except OSError as e:
            raise CheckpointError(
                f"expected to write {name}.pth in {self.folder}, got {e.strerror or e}; {remedy(str(e))}, then the "
                "same command resumes from the checkpoint before"
            ) from e

    def resume_or_load(self, path: str | None, *, resume: bool) -> int:
        """Restore everything from the folder's last file if ``resume``, else the classifiers from ``path``.

        Returns:
            The last iteration before the file was written, -1 without a file.

        Raises:
            CheckpointError: the file cannot be read, or is for other classifiers.
        """
        last = last_checkpoint(self.folder) if resume else ""
        resume = bool(last)
        source = self.folder / last if last else path
        if not source:
            return -1
        state = read_weights(source)
        if not isinstance(state, Mapping) or "model" not in state or (resume and "scheduler" not in state):
            raise CheckpointError(f"expected a checkpoint of linear classifiers, got something else: {source}")
        try:
            self._check(state["model"], source)
            self.model.load_state_dict(state["model"])
            if resume:
                self.optimizer.load_state_dict(state["optimizer"])
                self.scheduler.load_state_dict(state["scheduler"])
            if (iteration := state.get("iteration", -1)) != -1:
                check_whole(state, "iteration", 0, 2**63)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as e:
            advice = "begin again with --no-resume" if resume else "give another --classifier-fpath"
            raise CheckpointError(
                f"expected a checkpoint of linear classifiers at {source}, got one with {type(e).__name__}: {e}; "
                f"{advice}"
            ) from e
        logger.info(f"classifiers from={source} iteration={iteration}")
        return iteration

    def _check(self, state: Mapping[str, Any], source: str | os.PathLike) -> None:
        own = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        got = {name: tuple(tensor.shape) for name, tensor in state.items()}
        differences = [
            f"{name}: expected {own.get(name, 'nothing')}, got {got.get(name, 'nothing')}"
            for name in {**own, **got}
            if own.get(name) != got.get(name)
        ]
        if differences:
            shown = "\n  ".join(differences[:4])
            raise CheckpointError(
                f"{source}: the checkpoint is of other classifiers, {len(differences)} tensors differ:\n  {shown}\n"
                "use the same --learning-rates, --batch-size, number of processes and classes; or another --output-dir "
                "or --no-resume"
            )
