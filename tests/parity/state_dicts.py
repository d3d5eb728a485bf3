"""Names and shapes of state dicts as text: upstream's from the oracle, four of them in ``tests/contracts`` too.

The files are used where the oracle is unavailable; ``python -m tests.parity.state_dicts`` writes them again. Register
tokens, which the oracle's revision does not have yet, are added by rule: after ``pos_embed``, (1, R, D).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from dinov2_custom.layers import DINOHead
from dinov2_custom.models import vision_transformer
from tests.oracle import OracleTrainer, ensure_oracle, load_oracle

CONTRACTS = Path(__file__).resolve().parents[1] / "contracts"

# name -> (architecture, img_size, arguments of the vit_* function)
BACKBONES = {
    "small_p14_518": ("vit_small", 518, {"patch_size": 14}),
    "small_p16_224": ("vit_small", 224, {"patch_size": 16}),
    "small_chunks4": ("vit_small", 224, {"patch_size": 16, "block_chunks": 4}),
    "small_swiglu_chunks5": ("vit_small", 224, {"patch_size": 14, "block_chunks": 5, "ffn_layer": "swiglufused"}),
    "small_no_bias_no_layerscale": (
        "vit_small",
        224,
        {"patch_size": 14, "qkv_bias": False, "proj_bias": False, "ffn_bias": False, "init_values": None},
    ),
    "small_reg4": ("vit_small", 518, {"patch_size": 14, "num_register_tokens": 4}),
    "base_p14_518": ("vit_base", 518, {"patch_size": 14}),
    "large_p14_518": ("vit_large", 518, {"patch_size": 14}),
    "large_swiglu_chunks4": ("vit_large", 224, {"patch_size": 14, "block_chunks": 4, "ffn_layer": "swiglufused"}),
    "giant2_p14_518": ("vit_giant2", 518, {"patch_size": 14, "ffn_layer": "swiglufused"}),
}
# name -> arguments of DINOHead
HEADS = {
    "dino_head": {"in_dim": 384, "out_dim": 65536},
    "dino_head_vitl14": {"in_dim": 1024, "out_dim": 131072, "bottleneck_dim": 384},
    "dino_head_one_layer": {"in_dim": 384, "out_dim": 4096, "nlayers": 1},
}
# name -> overrides of the default configuration, for the whole training model at TRAINING_DEPTH blocks
TRAINING = {
    "training_default": "student.arch=vit_small",
    "training_vitl14": (
        "student.arch=vit_large student.patch_size=14 student.ffn_layer=swiglufused student.block_chunks=2 "
        "dino.head_n_prototypes=4096 dino.head_bottleneck_dim=384 ibot.separate_head=true "
        "ibot.head_n_prototypes=3072 crops.local_crops_size=98"
    ),
}
TRAINING_DEPTH = 2
FILES = ("small_p14_518", "small_reg4", "giant2_p14_518", "dino_head")


def describe(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Return one line per tensor, in order: its name and its shape."""
    return [f"{name} {tuple(value.shape)}" for name, value in state_dict.items()]


def build_backbone(vits, name: str, leave_out: str = "") -> torch.nn.Module:
    """Build backbone ``name`` of :data:`BACKBONES` on the meta device from a vision_transformer module."""
    arch, img_size, kwargs = BACKBONES[name]
    kwargs = {"init_values": 1.0, "block_chunks": 0, "drop_path_uniform": True, **kwargs}
    kwargs.pop(leave_out, None)
    with torch.device("meta"):
        return getattr(vits, arch)(img_size=img_size, **kwargs)


def own_lines(name: str) -> list[str]:
    """Return the lines of contract ``name``, a backbone or a head, from this package."""
    if name in BACKBONES:
        return describe(build_backbone(vision_transformer, name).state_dict())
    with torch.device("meta"):
        return describe(DINOHead(**HEADS[name]).state_dict())


def upstream_lines(oracle: SimpleNamespace, name: str) -> list[str]:
    """Return the lines of contract ``name`` from upstream's code."""
    if name in HEADS:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return describe(oracle.head.DINOHead(**HEADS[name]).state_dict())
    if name in TRAINING:
        return describe(OracleTrainer(oracle, TRAINING[name].split(), depth=TRAINING_DEPTH).model.state_dict())
    kwargs = BACKBONES[name][2]
    if "num_register_tokens" not in kwargs:
        return describe(build_backbone(oracle.vits, name).state_dict())
    model = build_backbone(oracle.vits, name, leave_out="num_register_tokens")
    lines = describe(model.state_dict())
    return [*lines[:2], f"register_tokens {(1, kwargs['num_register_tokens'], model.embed_dim)}", *lines[2:]]


def read(name: str) -> list[str]:
    """Return the lines of a contract file."""
    return (CONTRACTS / f"state_dict_{name}.txt").read_text().splitlines()


def main() -> None:
    oracle = load_oracle(ensure_oracle())
    for name in FILES:
        path = CONTRACTS / f"state_dict_{name}.txt"
        path.write_text("\n".join(upstream_lines(oracle, name)) + "\n")
        print(path)


if __name__ == "__main__":
    main()
