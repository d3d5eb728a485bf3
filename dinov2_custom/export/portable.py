"""A backbone as flat tensors for one image size, complete for libraries without optional parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dinov2_custom.errors import ConfigError
from dinov2_custom.models.pos_embed import resample_pos_embed
from dinov2_custom.models.vision_transformer import DinoVisionTransformer
from dinov2_custom.reading import Reading
from dinov2_custom.teacher import Teacher
from dinov2_custom.utils.weights import flat_name


class Portable(NamedTuple):
    """The model data that every format needs.

    Attributes:
        backbone: the source of the tensors and reference for comparisons.
        state: float32 tensors under the released weights' names, positions sized for ``image_size``.
        hidden: width inside the feed-forward network: rows of ``fc1``, or columns of ``w3``; 0 without one.
        reading: of images of more than 8 bits or several pages, as in the model's training.
        normalizes: the export takes images of 0..1 and applies ``normalize`` itself; only ONNX can.
    """

    backbone: DinoVisionTransformer
    state: dict[str, Tensor]
    image_size: int
    normalize: dict[str, tuple[float, ...]]
    in_chans: int
    swiglu: bool
    hidden: int
    reading: Reading = Reading()
    normalizes: bool = False


def portable(teacher: Teacher, image_size: int = 0) -> Portable:
    """Return ``teacher`` for images of ``image_size`` pixels a side (0 for that of its training).

    Raises:
        ConfigError: the size is not a multiple of the patch size.
    """
    backbone = teacher.backbone
    size, patch = image_size or teacher.image_size, backbone.patch_size
    if size < patch or size % patch:
        raise ConfigError(
            f"--image-size: expected a multiple of the patch size {patch}, got {size}; "
            f"use {max(size // patch, 1) * patch} or {-(-size // patch) * patch}"
        )
    state = {flat_name(name): value.detach().float().cpu() for name, value in backbone.state_dict().items()}
    if size != teacher.image_size:
        state["pos_embed"] = resample_pos_embed(
            state["pos_embed"],
            (size // patch, size // patch),
            antialias=backbone.interpolate_antialias,
            offset=backbone.interpolate_offset,
        )
    state = {name: value.clone().contiguous() for name, value in state.items()}
    swiglu = "blocks.0.mlp.w12.weight" in state
    inner = state.get("blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight")
    return Portable(
        backbone,
        state,
        size,
        teacher.normalize,
        in_chans=state["patch_embed.proj.weight"].shape[1],
        swiglu=swiglu,
        hidden=0 if inner is None else inner.shape[1],
        reading=teacher.reading,
    )


def completed(model: Portable) -> dict[str, Tensor]:
    """Return the state with missing LayerScales and biases filled in by ones and zeros, which have no effect.

    Raises:
        ConfigError: blocks without a feed-forward network, which no other library supports.
    """
    if not model.hidden:
        raise ConfigError(
            "expected a model with a feed-forward network, got ffn_layer=identity; use --to onnx or torch"
        )
    state, dim = dict(model.state), model.backbone.embed_dim
    for index in range(model.backbone.n_blocks):
        block = f"blocks.{index}."
        for name in ("ls1.gamma", "ls2.gamma"):
            state.setdefault(block + name, torch.ones(dim))
        for name in ("attn.qkv", "attn.proj", *(("mlp.w12", "mlp.w3") if model.swiglu else ("mlp.fc1", "mlp.fc2"))):
            state.setdefault(f"{block}{name}.bias", torch.zeros(len(state[f"{block}{name}.weight"])))
    return state
