"""Starting a run from existing weights: released files, Hugging Face's, teacher checkpoints, whole runs.

Read :func:`start_from_weights` first. Not here: reading files of any layout (``utils.weights``), resuming a run
(``checkpoint.py``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_custom.errors import CheckpointError
from dinov2_custom.models.pos_embed import resample_pos_embed
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.run_folder import find_weights
from dinov2_custom.utils.weights import fit_state, flat_heads, flat_state, load_state, misfit, read_weights

logger = logging.getLogger("dinov2")
# Released weights before registers lack them, and some converted files the mask token, which starts at 0.
_OPTIONAL = ("mask_token", "register_tokens")


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
    load_pretrained_backbone(model.student["backbone"], source, student_file, key=key)
    _load_heads(model.student, flat_heads(student_file), source)
    if whole is None:
        model.teacher.load_state_dict(model.student.state_dict())
        return
    load_pretrained_backbone(model.teacher["backbone"], source, _part(whole, "teacher."), key=key)
    _load_heads(model.teacher, flat_heads(_part(whole, "teacher.")), source)
    for name in ("dino_loss", "ibot_patch_loss"):
        center = whole.get(f"{name}.center")
        if center is not None and not misfit(getattr(model, name).center, center):
            getattr(model, name).center.copy_(center)


def load_pretrained_backbone(
    backbone: nn.Module, path: str | Path, file: Any = None, *, key: str = "student.pretrained_weights"
) -> None:
    """Load ``backbone`` from ``path``, whatever wrapper, prefix, naming, block chunking or image size the file has.

    Args:
        file: what ``path`` holds, where it has been read already.
        key: of the configuration, for the error.

    Raises:
        CheckpointError: unreadable, or its tensors do not fit (another width, depth or FFN); nothing is changed then.
    """
    state = flat_state(read_weights(path) if file is None else file)
    if _can_be_resampled(state.get("pos_embed"), backbone.pos_embed):
        state["pos_embed"] = _fit_pos_embed(backbone, state["pos_embed"], path)
    fit = load_state(
        backbone,
        state,
        path,
        expected=f"{key}: expected weights of this architecture",
        advice="check student.arch, student.ffn_layer (released S, B and L use mlp, g swiglufused) and "
        "student.patch_size",
        optional=_OPTIONAL,
        allow_unexpected=True,
    )
    logger.info(
        f"pretrained backbone from={without_credentials(path)} matched={len(fit.found)} missing={len(fit.missing)} "
        f"unexpected={len(fit.unexpected)}" + (f" ({', '.join(fit.unexpected[:3])})" if fit.unexpected else "")
    )


def _load_heads(network: nn.ModuleDict, heads: dict[str, dict[str, Tensor]], source: str | Path) -> None:
    """Load the heads that the file has, each as a whole or not at all, and say which."""
    shown = without_credentials(source)
    for name, head in network.items():
        if name == "backbone":
            continue
        if name not in heads:
            logger.info(f"{name}: not in {shown}, starts at random")
            continue
        fit = fit_state(head, heads[name])
        if fit.missing or fit.unexpected or fit.misfits:
            logger.warning(f"{name}: does not fit in {shown}, starts at random: {'; '.join(fit.examples(1))}")
            continue
        head.load_state_dict(fit.found)
        logger.info(f"pretrained {name} from={shown} matched={len(fit.found)} missing=0 unexpected=0")


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


def _can_be_resampled(given: Tensor | None, own: Tensor) -> bool:
    """Return whether ``given`` differs from ``own`` in nothing but its number of patches, which form a square."""
    if given is None or given.shape[1] == own.shape[1] or not given.is_floating_point():
        return False
    return math.isqrt(given.shape[1] - 1) ** 2 == given.shape[1] - 1 and given[:, 0].shape == own[:, 0].shape


def _fit_pos_embed(backbone: nn.Module, pos_embed: Tensor, path: str | Path) -> Tensor:
    grid = backbone.patch_embed.patches_resolution
    shown = without_credentials(path)
    logger.info(f"resampled pos_embed positions={pos_embed.shape[1] - 1} to={grid[0]}x{grid[1]} from={shown}")
    with torch.no_grad():
        return resample_pos_embed(
            pos_embed, grid, antialias=backbone.interpolate_antialias, offset=backbone.interpolate_offset
        )
