"""Floating-point operations of a training step, and the model FLOPs utilisation (MFU) that they give.

A multiply-add counts as two. The count covers the matrix products of the definition, forward and backward, in student,
teacher and heads; it excludes norms, activations, the optimizer and anything recomputed to save memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dinov2_custom.layers.drop_path import num_kept
from dinov2_custom.layers.swiglu_ffn import aligned_hidden_features
from dinov2_custom.train.gpus import GPUS, find_gpu


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's dense 16-bit rate in FLOP/s, or None for an unknown device."""
    name = find_gpu(device_name)
    return GPUS[name].flops if name else None


def flops_per_image(cfg, width: int, depth: int) -> float:
    """Return the FLOPs per image of one step; ``width`` and ``depth`` are the backbone's."""
    b, crops, patch = cfg.train.batch_size_per_gpu, cfg.crops, cfg.student.patch_size
    num_local = crops.local_crops_number if cfg.dino.loss_weight > 0 else 0
    global_patches = (crops.global_crops_size // patch) ** 2
    views = [(2, global_patches)] + ([(num_local, (crops.local_crops_size // patch) ** 2)] if num_local else [])
    kept = [num_kept(count * b, cfg.student.drop_path_rate) / (count * b) for count, _ in views]
    if not cfg.student.drop_path_uniform:
        kept = [(1 + share) / 2 for share in kept]  # drop rates rise linearly with depth
    extra = 1 + cfg.student.num_register_tokens
    student = teacher = 0.0
    for (count, patches), share in zip(views, kept, strict=True):
        embed = count * patches * 2 * 3 * patch**2 * width
        student += 2 * embed + 3 * share * count * depth * _block(cfg, patches + extra, width)  # no pixel gradient
    teacher = 2 * (global_patches * 2 * 3 * patch**2 * width + depth * _block(cfg, global_patches + extra, width))
    return student + teacher + _heads(cfg, width, global_patches, num_local)


def _block(cfg, tokens: int, width: int) -> float:
    """Return the forward FLOPs of one block for one sequence."""
    hidden = 4 * width
    ffn = {"mlp": 2 * hidden * width, "identity": 0}.get(
        cfg.student.ffn_layer, 3 * aligned_hidden_features(hidden) * width
    )
    return 2 * tokens * (4 * width**2 + ffn) + 4 * tokens**2 * width


def _heads(cfg, width: int, patches: int, num_local: int) -> float:
    """Return the FLOPs of the heads for one image: forward in the teacher, three times that in the student."""
    masked = 0.0
    if cfg.ibot.loss_weight > 0:
        masked = 2 * cfg.ibot.mask_sample_probability * patches * sum(cfg.ibot.mask_ratio_min_max) / 2
    cls = (2, 2 + num_local) if cfg.dino.loss_weight > 0 else (0, 0)
    patch_head = cfg.ibot if cfg.ibot.separate_head else cfg.dino
    of_cls = (cls[0] + 3 * cls[1]) * _head(cfg.dino, width)
    return of_cls + (1 + 3) * masked * _head(patch_head, width)


def _head(section, width: int) -> float:
    """Return the forward FLOPs of a head for one row."""
    hidden, bottleneck, layers = section.head_hidden_dim, section.head_bottleneck_dim, max(section.head_nlayers, 1)
    widths = [width, *[hidden] * (layers - 1), bottleneck, section.head_n_prototypes]
    return 2 * sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def speed_report(cfg, model, world_size: int) -> Callable[[float], dict[str, float]]:
    """Return a function from global images/s to ``tflops`` per device and, on a known GPU, ``mfu`` (0..1)."""
    backbone = model.student["backbone"]
    operations = flops_per_image(cfg, backbone.embed_dim, backbone.n_blocks) / world_size
    peak = peak_flops(torch.cuda.get_device_name(model.device)) if model.device.type == "cuda" else None

    def report(images_per_s: float) -> dict[str, float]:
        achieved = images_per_s * operations
        return {"tflops": achieved / 1e12} | ({"mfu": achieved / peak} if peak else {})

    return report
