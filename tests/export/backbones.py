"""Small backbones with random weights of every kind that an export must support."""

from __future__ import annotations

import torch

from dinov2_custom.models import vision_transformer as vits
from dinov2_custom.teacher import Teacher

NORMALIZE = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
KINDS = {
    "patch 14": {"img_size": 56, "patch_size": 14},
    "chunks, no layerscale, no biases": {
        "block_chunks": 2,
        "init_values": None,
        "qkv_bias": False,
        "proj_bias": False,
        "ffn_bias": False,
    },
    "registers": {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0},
    "swiglu, registers": {"ffn_layer": "swiglufused", "num_register_tokens": 2},
    "swiglu": {"ffn_layer": "swiglufused"},
}


def make_teacher(kind="patch 14", **kwargs):
    """Return a frozen vit_nano with weights far from their initial values, so that every tensor matters."""
    options = {"img_size": 32, "patch_size": 8, "init_values": 1.0, "block_chunks": 0} | KINDS[kind] | kwargs
    backbone = vits.vit_nano(**options).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in backbone.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(noise * 0.1 + (1 if "norm" in name or "gamma" in name else 0))
    return Teacher(backbone, options["img_size"], NORMALIZE, "weights")


def features_of(backbone, images):
    """Return class and patch features (B, 1 + N, D)."""
    with torch.inference_mode():
        out = backbone.forward_features(images)
    return torch.cat([out["x_norm_clstoken"][:, None], out["x_norm_patchtokens"]], dim=1)


def random_images(side, count=3):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
