"""Starting a run from existing weights: released files, Hugging Face's, teacher checkpoints, whole runs."""

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
    """Load the weights that ``MODEL.WEIGHTS`` or ``student.pretrained_weights`` name, if any, into a fresh model.

    ``student.pretrained_weights`` is loaded into the student: the backbone, and those heads of the file that fit. The
    teacher becomes a copy of it. ``MODEL.WEIGHTS`` takes precedence; if that file holds a whole training state,
    student, teacher and centres are each loaded from their own part. A run directory stands for its newest teacher.
    Optimizer, iteration and random streams start from zero either way.

    Raises:
        CheckpointError: the backbone does not fit; the model is unchanged.
    """
    source, key = cfg.MODEL.WEIGHTS or cfg.student.pretrained_weights, "student.pretrained_weights"
    if not source:
        return
    if cfg.MODEL.WEIGHTS:
        key = "MODEL.WEIGHTS"
        if cfg.student.pretrained_weights:
            logger.warning("MODEL.WEIGHTS takes precedence over student.pretrained_weights, which is not read")
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
    """Load those heads of the file that fit completely, and log which."""
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
    """Return the tensors of a file with a whole training state (student and teacher), None for any other file."""
    if isinstance(file, Mapping) and isinstance(file.get("model"), Mapping):
        file = file["model"]
    if not isinstance(file, Mapping):
        return None
    parts = {str(name).partition(".")[0] for name in file}
    return dict(file) if {"student", "teacher"} <= parts else None


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
