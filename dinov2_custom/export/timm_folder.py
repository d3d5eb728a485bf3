"""Write a folder for ``timm.create_model("local-dir:<folder>")``: config.json and model.safetensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_custom.export.portable import Portable, completed
from dinov2_custom.export.write import save_safetensors
from dinov2_custom.reading import to_facts

_RENAMED = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
_WIDTHS = {(384, 12): "small", (768, 12): "base", (1024, 24): "large"}


def write_timm(model: Portable, folder: Path) -> None:
    """Write the two files into the existing ``folder``."""
    state = to_timm(completed(model))
    save_safetensors(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(model), indent=2) + "\n", encoding="utf-8")


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's names. With registers, timm adds positions to patches only: the class token includes its own."""
    state = {re.sub(r"mlp\.(w12|w3)", lambda m: _RENAMED[m[0]], name): value for name, value in state.items()}
    state.pop("mask_token", None)
    if "register_tokens" in state:
        positions = state["pos_embed"]
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:].contiguous()
    return state


def _config(model: Portable) -> dict[str, Any]:
    """Return the name of timm's closest model and every argument in which this model may differ."""
    backbone, side = model.backbone, model.image_size
    nearest = "giant" if model.swiglu else _WIDTHS.get((backbone.embed_dim, backbone.n_blocks), "small")
    registers = backbone.num_register_tokens
    arguments = {
        "img_size": side,
        "patch_size": backbone.patch_size,
        "in_chans": model.in_chans,
        "embed_dim": backbone.embed_dim,
        "depth": backbone.n_blocks,
        "num_heads": backbone.num_heads,
        # half a unit keeps timm's int(dim * ratio) from falling below the width
        "mlp_ratio": (model.hidden * (2 if model.swiglu else 1) + 0.5) / backbone.embed_dim,
        "init_values": 1.0,
        "reg_tokens": registers,
        "no_embed_class": bool(registers),
    }
    return {
        "architecture": f"vit_{nearest}_patch14_{'reg4_' if registers else ''}dinov2",
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [model.in_chans, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,
            "mean": list(model.normalize["mean"]),
            "std": list(model.normalize["std"]),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        **to_facts(model.reading),  # timm rejects unknown names in pretrained_cfg
    }
