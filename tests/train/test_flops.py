import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinov2_custom.train.flops import flops_per_image, peak_flops, speed_report
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import random_batch, tiny_config


@pytest.mark.parametrize("lean", ["true", "false"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("student.ffn_layer=swiglu", "ibot.separate_head=true"),
        ("student.drop_path_rate=0.5", "dino.head_nlayers=1"),
        ("crops.local_crops_number=0",),
        ("student.num_register_tokens=3", "ibot.loss_weight=0"),
    ],
    ids=str,
)
def test_formula_is_what_torch_counts(overrides, lean):
    cfg = tiny_config(*overrides, f"train.lean={lean}", "dino.koleo_loss_weight=0", "ibot.mask_ratio_min_max=[0.3,0.3]")
    model, batch = SSLMetaArch(cfg).train(), masked(random_batch(cfg), 0.3)
    for part in (model.student, model.teacher):
        for block in part["backbone"].all_blocks():
            block.attn.backend = "products"  # which the counter knows on every device
    counter = FlopCounterMode(display=False)
    with counter:
        model.forward_backward(batch, 0.05, torch.Generator().manual_seed(0))
    expected = flops_per_image(cfg, 64, 4) * cfg.train.batch_size_per_gpu
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def masked(batch, ratio):
    """Mask ``ratio`` of the patches of every second global crop."""
    masks = torch.zeros_like(batch["collated_masks"])
    masks[::2, : round(ratio * masks.shape[1])] = True
    indices = masks.flatten().nonzero().flatten()
    counts = torch.full((1,), len(indices))
    weights = torch.full((len(indices),), 1 / masks[0].sum())
    new = {"collated_masks": masks, "mask_indices_list": indices, "masks_weight": weights, "n_masked_patches": counts}
    return batch | new | {"upperbound": len(indices)}


def test_known_models():
    """Figures of the closed formula, GFLOP per image: L/14 with 2x224 + 8x98 has 1.5 TFLOP."""
    sizes = "student.patch_size=14 crops.global_crops_size=224 crops.local_crops_size=98 crops.local_crops_number=8"
    head = "dino.head_n_prototypes=65536 dino.head_hidden_dim=2048 dino.head_bottleneck_dim=256"
    cfg = tiny_config(*f"{sizes} {head} student.drop_path_rate=0.3 train.batch_size_per_gpu=64".split())
    assert flops_per_image(cfg, 1024, 24) / 1e9 == pytest.approx(1533, rel=0.02)


def test_peaks_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Some GPU") is None


def test_report_on_a_cpu_has_no_mfu():
    cfg = tiny_config()
    report = speed_report(cfg, SSLMetaArch(cfg), world_size=2)(100.0)
    assert set(report) == {"tflops"} and report["tflops"] == flops_per_image(cfg, 64, 4) * 50 / 1e12
