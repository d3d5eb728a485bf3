"""Count the memory of a training step for architectures, batches and numbers of GPUs, without any GPU.

The counts are exact for tensors and independent of the machine; ``dinov2_custom/train/memory.py`` lists what they leave
out. ``python -m benchmarks.memory --write`` writes results/memory.md.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from benchmarks.machine import add_write_option, describe, finish, table
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.plan.memory import sharded
from dinov2_custom.train.flops import flops_per_image
from dinov2_custom.train.memory import CATEGORIES, measure_step
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

GIANT = "student.ffn_layer=swiglufused student.drop_path_rate=0.4 dino.head_n_prototypes=131072"
# name, batches, overrides of upstream's default configuration
MODELS = {
    "ViT-S/14": ((32, 64, 128), "student.arch=vit_small"),
    "ViT-B/14": ((32, 64, 128), "student.arch=vit_base"),
    "ViT-L/14": ((32, 64, 128), "student.arch=vit_large"),
    "ViT-g/14, 131,072 prototypes": ((12, 32), f"student.arch=vit_giant2 {GIANT}"),
    "ViT-g/14 as vitg14.yaml": (
        (12,),
        f"student.arch=vit_giant2 {GIANT} dino.head_bottleneck_dim=384 ibot.separate_head=true "
        "ibot.head_n_prototypes=131072 train.centering=sinkhorn_knopp",
    ),
}
COMMON = "student.patch_size=14 crops.local_crops_size=98"
WITHOUT = "train.lean=false train.view_groups=1"
SHARDED_OVER = 8


def config(overrides: str, batch_size: int):
    options = [*COMMON.split(), *overrides.split(), f"train.batch_size_per_gpu={batch_size}"]
    return load_run_config("", options, output_dir="unused", require_dataset=False, warn=lambda note: None)


def student_of(cfg) -> nn.ModuleDict:
    """Return the student on the meta device."""
    with torch.device("meta"):
        return SSLMetaArch(cfg).student


def step_operations(cfg) -> float:
    """Return the FLOPs of a step by the formula of ``dinov2_custom/train/flops.py``."""
    backbone = student_of(cfg)["backbone"]
    return cfg.train.batch_size_per_gpu * flops_per_image(cfg, backbone.embed_dim, backbone.n_blocks)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose name contains this")
    add_write_option(parser)
    args = parser.parse_args()
    rows, parts, compiled = [], [], []
    for name, (batches, overrides) in MODELS.items():
        for batch_size in batches if args.only in name else ():
            cfg = config(overrides, batch_size)
            plain = measure_step(SSLMetaArch, config(f"{overrides} {WITHOUT}", batch_size))
            none, selective, full = (measure_step(SSLMetaArch, cfg, mode) for mode in ("none", "selective", "full"))
            compiled.append(measure_step(SSLMetaArch, cfg, compiler=lambda function: function).peak - none.peak)
            counts = (plain.peak, none.peak, selective.peak, full.peak, sharded(none, SHARDED_OVER))
            rows.append([name, batch_size, *map(gigabytes, counts)])
            parts.append([name, batch_size, *(f"{none.categories[part] / 1e9:.2f}" for part in CATEGORIES)])
    header = ["model", "batch", "autograd's own, all views at once", "**default**", "selective", "full"]
    page = (
        "# Memory of one training step, GB (10^9 bytes) at the peak\n\n"
        f"{describe('benchmarks.memory')}\n"
        "2 x 224 + 8 x 98 px, bf16, 65,536 prototypes and centering unless said. Counted on tensors without data; a "
        "CUDA context, libraries' workspaces and what the allocator loses come on top.\n\n"
        f"{table([*header, f'default, sharded over {SHARDED_OVER} (estimate)'], rows)}\n"
        "The third column is `train.lean=false train.view_groups=1`; *selective* and *full* are "
        "`train.activation_checkpointing` on top of the default, which computes only norms and activations again. "
        "One GPU, or each of several under DDP, whose buckets add up to one copy of the gradients. The last column "
        "takes 7/8 of weights, gradients and optimizer state away; a gathered block is not in it. With "
        "`train.compile=on` the default's counts change by "
        f"{min(compiled) / 1e9:+.2f} to {max(compiled) / 1e9:+.2f} GB.\n\n"
        "## By category, default\n\n"
        f"{table(['model', 'batch', *CATEGORIES], parts)}\n"
        "heads: logits, targets and their gradients.\n"
    )
    finish(page, "memory", args.write)


if __name__ == "__main__":
    main()
