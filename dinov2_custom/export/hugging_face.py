"""Write a folder for ``transformers.AutoModel.from_pretrained``: Dinov2Model, or Dinov2WithRegistersModel.

Names are those of the published ``facebook/dinov2-*`` checkpoints, which every version of transformers reads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2_custom.data.transforms import resize_side
from dinov2_custom.export.portable import Portable, completed
from dinov2_custom.export.write import save_safetensors
from dinov2_custom.reading import to_facts

_TOP = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_IN_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "ls2.gamma": "layer_scale2.lambda1",
}
_QKV = ("query", "key", "value")


def write_hugging_face(model: Portable, folder: Path) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json into the existing ``folder``.

    Raises:
        ConfigError: the model has no feed-forward network.
    """
    save_safetensors(to_hugging_face(completed(model)), folder / "model.safetensors")
    for name, content in (("config.json", _config(model)), ("preprocessor_config.json", _preprocessor(model))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from the released names, and split ``qkv`` into its three parts."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
        if match is None:
            stem, suffix = _stem(name)
            renamed[_TOP[stem] + suffix] = value
            continue
        index, stem, suffix = match[1], match[2], match[3] or ""
        layer = f"encoder.layer.{index}."
        if stem == "attn.qkv":
            for part, rows in zip(_QKV, value.chunk(3), strict=True):
                renamed[f"{layer}attention.attention.{part}{suffix}"] = rows.contiguous()
        else:
            renamed[layer + _IN_BLOCK[stem] + suffix] = value
    return renamed


def _stem(name: str) -> tuple[str, str]:
    for suffix in (".weight", ".bias"):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def _config(model: Portable) -> dict[str, Any]:
    backbone, registers = model.backbone, model.backbone.num_register_tokens
    ratio = 4 if model.swiglu else model.hidden / backbone.embed_dim
    config = {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.n_blocks,
        "num_attention_heads": backbone.num_heads,
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": model.image_size,
        "patch_size": backbone.patch_size,
        "num_channels": model.in_chans,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": model.swiglu,
    }
    return config | ({"num_register_tokens": registers} if registers else {})


def _preprocessor(model: Portable) -> dict[str, Any]:
    side = model.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize_side(side)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.normalize["mean"]),
        "image_std": list(model.normalize["std"]),
        **to_facts(model.reading),
    }
