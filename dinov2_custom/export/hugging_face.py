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
from dinov2_custom.utils.hugging_face import IN_LAYER, QUERY_KEY_VALUE, TOP, rename_start

_TO_TOP = {new: old for old, new in TOP.items()}
_TO_LAYER = {new: old for old, new in reversed(IN_LAYER.items())}  # of several old names, the published one


def write_hugging_face(model: Portable, folder: Path) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json into the existing ``folder``."""
    save_safetensors(to_hugging_face(completed(model)), folder / "model.safetensors")
    for name, content in (("config.json", _config(model)), ("preprocessor_config.json", _preprocessor(model))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from the released names, and split ``qkv`` into its three parts."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block is None:
            renamed[rename_start(name, _TO_TOP)] = value
            continue
        layer, rest = f"encoder.layer.{block[1]}.", block[2]
        if rest.startswith("attn.qkv."):
            for part, rows in zip(QUERY_KEY_VALUE, value.chunk(3), strict=True):
                renamed[layer + rest.replace("attn.qkv", part)] = rows.contiguous()
        else:
            renamed[layer + rename_start(rest, _TO_LAYER)] = value
    return renamed


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
