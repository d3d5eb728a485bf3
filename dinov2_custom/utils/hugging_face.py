"""Convert weights of Hugging Face's Dinov2 and Dinov2WithRegisters to the released names.

``export/hugging_face.py`` has the inverse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dinov2_custom.errors import CheckpointError

_PREFIX = re.compile(
    r"^(?:backbone\.|model\.)?(?:dinov2_with_registers\.|dinov2\.)?(?=embeddings\.|encoder\.|layernorm\.)"
)
TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "layernorm.": "norm.",
}
IN_LAYER = {
    "attention.output.dense.": "attn.proj.",
    "attention.o_proj.": "attn.proj.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in.": "mlp.w12.",
    "mlp.weights_out.": "mlp.w3.",
    "mlp.down_proj.": "mlp.w3.",
}
QUERY_KEY_VALUE = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
# Several tensors in published files and in transformers 5 models that are a single tensor here.
_MERGED = {
    "attn.qkv": (QUERY_KEY_VALUE, ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    "mlp.w12": (("mlp.gate_proj", "mlp.up_proj"),),
}
_PARTS = {part: (name, parts) for name, spellings in _MERGED.items() for parts in spellings for part in parts}
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")


def is_hugging_face(names: Mapping[str, object]) -> bool:
    """Return whether the names are those of a Hugging Face model of this family."""
    return any(_PREFIX.sub("", name) == "embeddings.cls_token" for name in names)


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors, and merge query, key and value into ``qkv`` and a SwiGLU's gate and input into ``w12``.

    Unknown names are kept.

    Raises:
        CheckpointError: a layer has only some of the tensors to merge.
    """
    renamed: dict[str, Tensor] = {}
    found: dict[tuple[str, tuple[str, ...]], dict[str, Tensor]] = {}
    for name, value in state.items():
        name = _PREFIX.sub("", name)
        layer = _LAYER.fullmatch(name)
        if layer is None:
            renamed[rename_start(name, TOP)] = value
            continue
        stem, _, leaf = layer[2].rpartition(".")
        if stem in _PARTS:
            merged, parts = _PARTS[stem]
            found.setdefault((f"blocks.{layer[1]}.{merged}.{leaf}", parts), {})[stem] = value
        else:
            renamed[f"blocks.{layer[1]}.{rename_start(layer[2], IN_LAYER)}"] = value
    for (name, parts), tensors in found.items():
        if missing := [part for part in parts if part not in tensors]:
            raise CheckpointError(
                f"{name}: expected {', '.join(parts)}, got no {', '.join(missing)} in the file; download it again"
            )
        renamed[name] = torch.cat([tensors[part] for part in parts])
    return renamed


def rename_start(name: str, table: dict[str, str]) -> str:
    """Return ``name`` with its beginning replaced as ``table`` says; a name that it does not know is kept."""
    return next((new + name.removeprefix(old) for old, new in table.items() if name.startswith(old)), name)
