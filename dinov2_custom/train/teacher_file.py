"""The teacher's weights in upstream's layout: the result of a run."""

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


def teacher_weights(model: nn.Module, copy: bool = False) -> dict[str, dict[str, torch.Tensor]] | None:
    """Return upstream's layout, {"teacher": {backbone.*, dino_head.*, ...}}, whole, in float32, in host memory.

    Only the main process gets the dict, the others None. All processes must call it: sharded tensors are gathered one
    at a time. Tensors that are in host memory already are not copied, unless ``copy``.
    """
    weights = {}
    for key, tensor in model.teacher.state_dict().items():
        whole = whole_tensor(tensor).detach()
        if distributed.is_main_process():
            # a gathered tensor may be a view of a larger buffer, all of which torch.save would write
            weights[key] = whole.to("cpu", torch.float32, copy=copy or is_sharded(tensor))
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
        OSError: the file cannot be written; no partial file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb", fsync=True) as file:
        try:
            torch.save(obj, file)
        except RuntimeError as e:  # raised by torch's writer when a write fails, for example on a full disk
            raise e.__context__ if isinstance(e.__context__, OSError) else OSError(str(e)) from e
