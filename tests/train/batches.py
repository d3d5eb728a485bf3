"""Random batches in the format of the collate function, for tests of the step."""

import torch

from dinov2_custom.configs.load import load_run_config

TINY = (
    "student.arch=vit_nano",
    "student.patch_size=4",
    "student.drop_path_rate=0.0",
    "crops.global_crops_size=16",
    "crops.local_crops_size=8",
    "crops.local_crops_number=2",
    "dino.head_n_prototypes=32",
    "dino.head_hidden_dim=32",
    "dino.head_bottleneck_dim=16",
    "ibot.head_n_prototypes=24",
    "ibot.head_hidden_dim=32",
    "ibot.head_bottleneck_dim=16",
    "train.batch_size_per_gpu=4",
)


def tiny_config(*overrides):
    """Return a configuration small enough for a step in milliseconds, in float32 unless overridden."""
    precision = [
        f"compute_precision.{model}.{part}.mixed_precision.param_dtype=fp32"
        for model in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    ]
    return load_run_config("", [*TINY, *precision, *overrides], output_dir="unused", require_dataset=False)


def random_batch(cfg, seed=0, batch=None, masked=True):
    """Return a collated batch: every second global crop has a mask, or none has."""
    g = torch.Generator().manual_seed(seed)
    batch = batch or cfg.train.batch_size_per_gpu
    side, local, count = cfg.crops.global_crops_size, cfg.crops.local_crops_size, cfg.crops.local_crops_number
    tokens = (side // cfg.student.patch_size) ** 2
    masks = torch.zeros(2 * batch, tokens, dtype=torch.bool)
    if masked and cfg.ibot.mask_sample_probability:
        masks[::2] = torch.rand(batch, tokens, generator=g) < 0.3
    indices = masks.flatten().nonzero().flatten()
    per_crop = (1 / masks.sum(dim=1).clamp_min(1)).unsqueeze(1).expand_as(masks)
    return {
        "collated_global_crops": torch.randn(2 * batch, 3, side, side, generator=g),
        "collated_local_crops": torch.randn(count * batch, 3, local, local, generator=g),
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": per_crop[masks],
        "upperbound": len(indices),
        "n_masked_patches": torch.full((1,), len(indices), dtype=torch.long),
    }
