"""Learning-rate and weight-decay multipliers of every parameter, and optimizer groups made of them.

Names of wrapped modules (FSDP, DDP, torch.compile, activation checkpointing) are supported.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

logger = logging.getLogger("dinov2")

_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_EMBEDDINGS = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.(?:(\d+)\.)?")  # i is global in both forms


def get_vit_lr_decay_rate(
    name: str,
    lr_decay_rate: float = 1.0,
    num_layers: int = 12,
    force_is_backbone: bool = False,
    chunked_blocks: bool = False,
) -> float:
    """Return the learning-rate multiplier of the parameter ``name``: rate ** (num_layers + 1 - layer).

    The embeddings and tokens are layer 0, block i is layer i + 1, everything else (final norm, heads) is layer
    ``num_layers + 1`` and gets 1.

    Args:
        force_is_backbone: ``name`` belongs to a backbone even if it does not begin with ``backbone``.
        chunked_blocks: unused, as chunked names are recognised; kept for upstream's signature.

    Source: upstream utils/param_groups.py; layer-wise decay as in BEiT (Bao et al. 2022, appendix).
    """
    name = _plain_name(name)
    layer = num_layers + 1
    if force_is_backbone or name.startswith("backbone"):
        block = _BLOCK.search(name)
        if any(part in _EMBEDDINGS for part in name.split(".")):
            layer = 0
        elif block:
            layer = int(block[2] or block[1]) + 1
    return lr_decay_rate ** (num_layers + 1 - layer)


def get_params_groups_with_decay(
    model: nn.Module, lr_decay_rate: float = 1.0, patch_embed_lr_mult: float = 1.0
) -> list[dict[str, Any]]:
    """Return one optimizer group for each trainable parameter of ``model``, a backbone (has ``n_blocks``) or a head.

    Biases, norms and LayerScale gammas get ``wd_multiplier`` 0; tokens and position embeddings do decay. The weights of
    a head's ``last_layer`` are marked with ``is_last_layer``.

    Source: upstream utils/param_groups.py.
    """
    num_layers = _num_blocks(model)
    groups = []
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = _plain_name(full_name)
        lr_multiplier = get_vit_lr_decay_rate(name, lr_decay_rate, num_layers, force_is_backbone=num_layers > 0)
        if "patch_embed" in name:
            lr_multiplier *= patch_embed_lr_mult
        undecayed = name.endswith(".bias") or "norm" in name or "gamma" in name
        group = {
            "params": parameter,
            "is_last_layer": "last_layer" in name,
            "lr_multiplier": lr_multiplier,
            "wd_multiplier": 0.0 if undecayed else 1.0,
            "name": name,
        }
        groups.append(group)
        logger.debug(f"{name}: lr_multiplier={lr_multiplier:.5f} wd_multiplier={group['wd_multiplier']}")
    return groups


def fuse_params_groups(
    all_params_groups: Iterable[dict[str, Any]],
    keys: Sequence[str] = ("lr_multiplier", "wd_multiplier", "is_last_layer"),
) -> list[dict[str, Any]]:
    """Merge the groups that agree on ``keys``, in order of first appearance."""
    fused: dict[tuple, dict[str, Any]] = {}
    for group in all_params_groups:
        values = {key: group[key] for key in keys}
        fused.setdefault(tuple(values.values()), {"params": [], **values})["params"].append(group["params"])
    return list(fused.values())


def _plain_name(name: str) -> str:
    """Return ``name`` without the parts that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _num_blocks(model: nn.Module) -> int:
    """Return the depth of a backbone, 0 for a head."""
    while not hasattr(model, "n_blocks"):
        inner = [child for name, child in model.named_children() if name in _WRAPPERS]
        if not inner:
            break
        model = inner[0]
    if hasattr(model, "n_blocks"):
        return model.n_blocks
    if hasattr(model, "backbone"):
        return _num_blocks(model.backbone)
    return len(model.blocks) if hasattr(model, "blocks") else 0
