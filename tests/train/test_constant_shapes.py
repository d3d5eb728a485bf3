"""Padding changes no loss, gradient, centre or diagnostic, and makes all batches the same shape."""

import pytest
import torch

from dinov2_custom.train.constant_shapes import pad_patches, padded_count
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.test_parallel import facts_of_two
from tests.train.batches import random_batch, tiny_config
from tests.train.test_views import unsettled


def test_few_different_counts():
    assert [padded_count(n, 64) for n in (0, 1, 4, 5, 63, 64)] == [0, 4, 4, 8, 64, 64]
    assert padded_count(3, 2) == 3  # an upper bound may be above all there are


@pytest.mark.parametrize("apart", [False, True])
def test_rows_of_padding_weigh_nothing_and_lie_in_their_half(apart):
    batch = random_batch(tiny_config())
    positions, half = batch["mask_indices_list"], batch["collated_masks"].numel() // 2
    first = int((positions < half).sum())
    assert 0 < first != len(positions) - first
    batch["upperbound"] = len(positions) + 3
    padded, edge = pad_patches(batch, first, apart)
    real = padded["masks_weight"] > 0
    assert torch.equal(padded["mask_indices_list"][real], positions)
    assert torch.equal(padded["masks_weight"][real], batch["masks_weight"])
    assert len(real) >= batch["upperbound"] and padded["n_masked_patches"] == len(positions)
    if apart:
        assert len(real) == 2 * edge
        assert (padded["mask_indices_list"][:edge] < half).all() and (padded["mask_indices_list"][edge:] >= half).all()
    assert len(batch["masks_weight"]) == len(positions)  # the batch that was given is as it was


def two_steps(padded: bool, *overrides):
    """Return what two steps with their EMA left: losses, gradients, centres, diagnostics."""
    cfg = tiny_config("crops.global_crops_size=32", *overrides)
    model = unsettled(SSLMetaArch(cfg)).train()
    model.constant_shapes, model.diagnose = padded, True
    result = {}
    for seed in (0, 1):
        batch = random_batch(cfg, seed)
        batch["upperbound"] += 5
        losses = model.forward_backward(batch, 0.05, torch.Generator().manual_seed(seed))
        result |= {f"{name} {seed}": value for name, value in losses.items()} | dict(model.diagnostics)
    for loss in (model.dino_loss, model.ibot_patch_loss):
        loss.apply_center_update()
    result |= {name: value.clone() for name, value in model.named_buffers() if "center" in name}
    return result | {name: p.grad for name, p in model.student.named_parameters()}


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("lean", ["true", "false"])
@pytest.mark.parametrize("overrides", [("1", "true", "1"), ("4", "false", "1"), ("2", "true", "0")], ids=str)
def test_nothing_but_the_shapes_changes(centering, lean, overrides):
    groups, separate, dino = overrides
    overrides = (
        f"train.centering={centering}",
        f"train.lean={lean}",
        f"train.view_groups={groups}",
        f"ibot.separate_head={separate}",
        f"dino.loss_weight={dino}",
    )
    expected, got = two_steps(False, *overrides), two_steps(True, *overrides)
    assert list(got) == list(expected)
    for name, value in expected.items():
        if value is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("overrides", [("lean=true", "view_groups=4"), ("lean=false", "view_groups=1")], ids=str)
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_a_batch_without_any_masked_patch(overrides, centering):
    """All parameters have a gradient, that of the patches' own head is zero; no kernel sees a batch of no rows."""
    options = [f"train.{option}" for option in (*overrides, f"centering={centering}")]
    cfg = tiny_config("ibot.mask_sample_probability=0", "ibot.separate_head=true", *options)
    for rows in (None, 0, 7):
        model, batch, seen = SSLMetaArch(cfg).train(), random_batch(cfg), []
        model.constant_shapes, batch["upperbound"] = rows is not None, rows or 0
        model.teacher["ibot_head"].mlp.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        assert model.forward_backward(batch, 0.05)["ibot_loss"] == 0
        assert all(p.grad.isfinite().all() for p in model.student.parameters())
        assert not any(p.grad.any() for p in model.student["ibot_head"].parameters())
        assert all((len(x) > 0) == model.constant_shapes for x in seen) and seen


def test_all_batches_have_the_same_shapes():
    cfg = tiny_config("train.view_groups=1", "student.drop_path_rate=0.2")
    model, seen = SSLMetaArch(cfg).train(), set()
    model.constant_shapes = True
    for part in [head for side in (model.student, model.teacher) for name, head in side.items() if "head" in name]:
        part.mlp.register_forward_pre_hook(lambda module, args: seen.add((id(module), args[0].shape)))
    counts = set()
    for seed in range(4):
        batch = random_batch(cfg, seed)
        counts.add(len(batch["mask_indices_list"]))
        batch["upperbound"] = 30
        model.forward_backward(batch, 0.05)
    assert len(counts) > 1 and len(seen) == 2


TWO = """
import json, sys, torch
from dinov2_custom import distributed
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import random_batch, tiny_config
distributed.enable()
rank, out = distributed.get_global_rank(), {}
for centering in ("centering", "sinkhorn_knopp"):
    for padded in (False, True):
        cfg = tiny_config(f"train.centering={centering}", "train.view_groups=3")
        model = SSLMetaArch(cfg).train()
        model.constant_shapes = padded
        for seed in (0, 1):
            batch = random_batch(cfg, seed + 2 * rank)
            batch["upperbound"] += 3
            losses = model.forward_backward(batch, 0.05)
        loss = model.ibot_patch_loss
        loss.apply_center_update()
        norm = sum(p.grad.double().square().sum() for p in model.student.parameters()).sqrt()
        out[f"{centering} {padded}"] = [*map(float, losses.values()), norm.item(), *loss.center.flatten().tolist()]
json.dump(out, open(f"{sys.argv[1]}/{rank}.json", "w"))
distributed.disable()
"""


def test_sums_over_two_processes_leave_out_padding(tmp_path):
    results = facts_of_two(tmp_path, TWO)
    for result in results:
        for centering in ("centering", "sinkhorn_knopp"):
            assert result[f"{centering} True"] == pytest.approx(result[f"{centering} False"], rel=1e-6, abs=1e-7)
    assert results[0]["centering True"][:3] != results[1]["centering True"][:3]
