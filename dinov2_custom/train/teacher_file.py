"""The teacher's weights in upstream's layout, the file that a run is for. Read :func:`save_teacher` first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2_custom import distributed
from dinov2_custom.files import atomic_write
from dinov2_custom.parallel import is_sharded, whole_tensor


def teacher_path(folder: Path, name: str) -> Path:
    return Path(folder) / "eval" / name / "teacher_checkpoint.pth"


def teacher_weights(model: nn.Module) -> dict[str, dict[str, torch.Tensor]] | None:
    """Return upstream's layout, {"teacher": {backbone.*, dino_head.*, ...}}, whole, in float32, in host memory.

    Only the main process gets it, the others None. All must call it: sharded tensors are gathered one at a time. In
    host memory already, tensors are the model's own, not copies.
    """
    weights = {}
    for key, tensor in model.teacher.state_dict().items():
        whole = whole_tensor(tensor).detach()
        if distributed.is_main_process():
            # what was gathered may be part of a larger buffer, which torch.save would write
            weights[key] = whole.to("cpu", torch.float32, copy=is_sharded(tensor))
    return {"teacher": weights} if distributed.is_main_process() else None


def save_teacher(model: nn.Module, folder: Path, name: str) -> Path:
    """Write ``eval/<name>/teacher_checkpoint.pth``, see :func:`teacher_weights`. All processes call it."""
    path, teacher = teacher_path(folder, name), teacher_weights(model)
    if teacher is not None:
        save_atomically(teacher, path)
    return path


def save_atomically(obj: Any, path: Path) -> None:
    """Write ``obj`` with ``torch.save`` through :func:`files.atomic_write`.

    Raises:
        OSError: it cannot be written; nothing is left of the attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb", fsync=True) as file:
        try:
            torch.save(obj, file)
        except RuntimeError as e:  # torch's writer on a write that failed, for example on a full disk
            raise e.__context__ if isinstance(e.__context__, OSError) else OSError(str(e)) from e
