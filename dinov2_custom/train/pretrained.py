"""Starting the student from existing weights: released files, teacher checkpoints, runs of this project."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2_custom.errors import CheckpointError
from dinov2_custom.models.pos_embed import resample_pos_embed
from dinov2_custom.train.checkpoint import load_safely

logger = logging.getLogger("dinov2")
_WRAPPERS = ("teacher", "student", "model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.", "teacher.", "student.")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")


def load_pretrained_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Load ``backbone`` from ``path``, whatever wrapper, prefix, block chunking or image size the file has.

    Raises:
        CheckpointError: unreadable, or its tensors do not fit (another width, depth or FFN); nothing is changed then.
    """
    state = backbone_state(load_safely(Path(path).expanduser()))
    own = backbone.state_dict()
    flat_names = {_CHUNKED.sub(r"blocks.\1.", name) if backbone.chunked_blocks else name: name for name in own}
    found = {flat_names[name]: tensor for name, tensor in state.items() if name in flat_names}
    if "pos_embed" in found and found["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
        found["pos_embed"] = _fit_pos_embed(backbone, found["pos_embed"], path)
    optional = {"mask_token", "register_tokens"}
    missing = [name for name in own if name not in found and name not in optional]
    unexpected = [name for name in state if name not in flat_names]
    misfits = [f"{n}: expected {tuple(own[n].shape)}, got {tuple(t.shape)}" for n, t in found.items()
               if own[n].shape != t.shape]  # fmt: skip
    if missing or misfits:
        shown = "\n  ".join([*misfits[:4], *(f"{name}: missing" for name in missing[:4])])
        raise CheckpointError(
            f"student.pretrained_weights: expected weights of this architecture, got {len(misfits)} tensors of another "
            f"shape, {len(missing)} missing, {len(unexpected)} unexpected in {path}:\n  {shown}\n"
            "check student.arch, student.ffn_layer (released S, B and L use mlp) and student.patch_size"
        )
    backbone.load_state_dict(found, strict=False)
    logger.info(f"pretrained backbone from={path} matched={len(found)} of={len(own)} unexpected={len(unexpected)}")


def backbone_state(file: Mapping) -> dict[str, Tensor]:
    """Return a flat state dict of the backbone with unchunked block names."""
    while wrapper := next((key for key in _WRAPPERS if isinstance(file.get(key), Mapping)), None):
        file = file[wrapper]
    state = {key: value for key, value in file.items() if isinstance(value, Tensor)}
    if any(key.startswith("teacher.") for key in state):  # a whole training state holds student and teacher
        state = {key: value for key, value in state.items() if key.startswith("teacher.")}
    state = {strip_prefixes(key): value for key, value in state.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
    return {_CHUNKED.sub(r"blocks.\1.", key): value for key, value in state.items()}


def strip_prefixes(key: str) -> str:
    while prefix := next((p for p in _PREFIXES if key.startswith(p)), None):
        key = key.removeprefix(prefix)
    return key


def _fit_pos_embed(backbone: nn.Module, pos_embed: Tensor, path: str | Path) -> Tensor:
    grid = backbone.patch_embed.patches_resolution
    logger.info(f"resampled pos_embed positions={pos_embed.shape[1] - 1} to={grid[0]}x{grid[1]} from={path}")
    with torch.no_grad():
        return resample_pos_embed(
            pos_embed, grid, antialias=backbone.interpolate_antialias, offset=backbone.interpolate_offset
        )
