"""Starting a run from existing weights: released files, Hugging Face's, teacher checkpoints, whole runs.

Read :func:`start_from_weights` first. Not here: files of any layout (``teacher``), resuming a run (``checkpoint.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinov2_custom.errors import CheckpointError
from dinov2_custom.teacher import load_pretrained_backbone, load_weights, misfit
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.run_folder import find_weights
from dinov2_custom.utils.weights import flat_heads, flat_state, read_weights

logger = logging.getLogger("dinov2")


def start_from_weights(cfg, model: nn.Module) -> None:
    """Give a fresh model the weights that ``MODEL.WEIGHTS`` or ``student.pretrained_weights`` name, if any.

    ``student.pretrained_weights`` goes into the student: the backbone, and the heads of the file that fit. The
    teacher becomes its copy. ``MODEL.WEIGHTS`` wins; where that file holds a whole run, student, teacher and centres
    are taken each from their own part. A run directory means its newest teacher.
    Optimizer, iteration and draws start from zero either way.

    Raises:
        CheckpointError: a backbone that does not fit; nothing is changed then.
    """
    source, key = cfg.MODEL.WEIGHTS or cfg.student.pretrained_weights, "student.pretrained_weights"
    if not source:
        return
    if cfg.MODEL.WEIGHTS:
        key = "MODEL.WEIGHTS"
        if cfg.student.pretrained_weights:
            logger.warning("MODEL.WEIGHTS wins over student.pretrained_weights, which is not read")
    try:
        source = find_weights(source)
    except CheckpointError as e:
        raise CheckpointError(f"{key}: {e}") from e
    file = read_weights(source)
    whole = _training_state(file) if cfg.MODEL.WEIGHTS else None
    student_file = file if whole is None else _part(whole, "student.")
    load_pretrained_backbone(model.student["backbone"], source, flat_state(student_file), key=key)
    _load_heads(model.student, flat_heads(student_file), source)
    if whole is None:
        model.teacher.load_state_dict(model.student.state_dict())
        return
    load_pretrained_backbone(model.teacher["backbone"], source, flat_state(_part(whole, "teacher.")), key=key)
    _load_heads(model.teacher, flat_heads(_part(whole, "teacher.")), source)
    for name in ("dino_loss", "ibot_patch_loss"):
        center = whole.get(f"{name}.center")
        if center is not None and not misfit(getattr(model, name).center, center):
            getattr(model, name).center.copy_(center)


def _load_heads(network: nn.ModuleDict, heads: dict[str, dict[str, Tensor]], source: str | Path) -> None:
    """Load the heads that the file has, each as a whole or not at all, and say which."""
    shown = without_credentials(source)
    for name, head in network.items():
        if name == "backbone":
            continue
        if name not in heads:
            logger.info(f"{name}: not in {shown}, starts at random")
            continue
        try:
            what, advice = f"the configured {name}", "it starts at random"
            load_weights(head, source, heads[name], key=name, what=what, advice=advice)
        except CheckpointError as e:
            logger.warning(str(e))


def _training_state(file: Any) -> dict[str, Tensor] | None:
    """Return the tensors of a whole run's file (student and teacher), None of any other."""
    if isinstance(file, Mapping) and isinstance(file.get("model"), Mapping):
        file = file["model"]
    if not isinstance(file, Mapping):
        return None
    parts = {str(name).partition(".")[0] for name in file}
    return dict(file) if {"student", "teacher"} <= parts else None


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
