"""Starting the student from existing weights: released files, teacher checkpoints, runs of this project."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2_custom.errors import CheckpointError
from dinov2_custom.models.pos_embed import resample_pos_embed
from dinov2_custom.utils.weights import fit_state, flat_state, read_weights

logger = logging.getLogger("dinov2")
# Released weights before registers lack them, and some converted files the mask token, which starts at 0.
_OPTIONAL = ("mask_token", "register_tokens")


def load_pretrained_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Load ``backbone`` from ``path``, whatever wrapper, prefix, block chunking or image size the file has.

    Raises:
        CheckpointError: unreadable, or its tensors do not fit (another width, depth or FFN); nothing is changed then.
    """
    state = flat_state(read_weights(path))
    if "pos_embed" in state and state["pos_embed"].shape[1] != backbone.pos_embed.shape[1]:
        state["pos_embed"] = _fit_pos_embed(backbone, state["pos_embed"], path)
    fit = fit_state(backbone, state)
    missing = [name for name in fit.missing if name not in _OPTIONAL]
    if missing or fit.misshapen:
        shown = "\n  ".join(fit._replace(missing=missing).examples())
        raise CheckpointError(
            f"student.pretrained_weights: expected weights of this architecture, got {len(fit.misshapen)} tensors of "
            f"another shape, {len(missing)} missing, {len(fit.unexpected)} unexpected in {path}:\n  {shown}\n"
            "check student.arch, student.ffn_layer (released S, B and L use mlp) and student.patch_size"
        )
    backbone.load_state_dict(fit.found, strict=False)
    logger.info(
        f"pretrained backbone from={path} matched={len(fit.found)} missing={len(fit.missing)} "
        f"unexpected={len(fit.unexpected)}"
    )


def _fit_pos_embed(backbone: nn.Module, pos_embed: Tensor, path: str | Path) -> Tensor:
    grid = backbone.patch_embed.patches_resolution
    logger.info(f"resampled pos_embed positions={pos_embed.shape[1] - 1} to={grid[0]}x{grid[1]} from={path}")
    with torch.no_grad():
        return resample_pos_embed(
            pos_embed, grid, antialias=backbone.interpolate_antialias, offset=backbone.interpolate_offset
        )
