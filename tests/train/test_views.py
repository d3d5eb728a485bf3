"""Groups of views and padded patches: neither changes a loss or a gradient beyond rounding."""

import pytest
import torch

from dinov2_custom.layers.drop_path import draw_kept
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.views import cut_draws, cut_views, group_views, pad_patches, padded_count
from tests.test_parallel import facts_of_two
from tests.train.batches import random_batch, tiny_config

NONE = range(0)
VITL = {"tokens_global": 64 * 257, "tokens_local": 64 * 50, "channels": 1024 * 24}


@pytest.mark.parametrize(
    ("setting", "num_local", "expected"),
    [
        (1, 8, [(range(2), range(8))]),
        (2, 8, [(range(2), NONE), (NONE, range(8))]),
        (3, 8, [(range(1), NONE), (range(1, 2), NONE), (NONE, range(8))]),
        (4, 5, [(range(1), NONE), (range(1, 2), NONE), (NONE, range(2)), (NONE, range(2, 5))]),
        (99, 2, [(range(1), NONE), (range(1, 2), NONE), (NONE, range(1)), (NONE, range(1, 2))]),
        (1, 0, [(range(2), NONE)]),
        (4, 0, [(range(1), NONE), (range(1, 2), NONE)]),
    ],
)
def test_groups(setting, num_local, expected):
    assert [tuple(group) for group in group_views(setting, num_local)] == expected


def test_auto_splits_large_batches_only():
    assert len(group_views("auto", 8, **VITL)) == 4
    assert len(group_views("auto", 8, 2 * 257, 2 * 50, channels=384 * 12)) == 1
    assert len(group_views("auto", 8, 8 * 257, 8 * 50, channels=384 * 12)) == 2
    assert len(group_views("auto", 0, **VITL)) == 2


def test_every_part_of_a_batch_is_in_one_group():
    cfg = tiny_config()
    batch = random_batch(cfg)
    first = int(batch["collated_masks"].chunk(2)[0].sum())
    views = [cut_views(batch, group, first) for group in group_views(4, 2)]
    crops = [one.global_crops for one in views if one.global_crops is not None]
    assert torch.equal(torch.cat(crops), batch["collated_global_crops"])
    assert torch.equal(torch.cat([one.patch_weights for one in views]), batch["masks_weight"])
    for one in views[:2]:
        assert torch.equal(one.patches, one.masks.flatten().nonzero().flatten())
        rows = slice(one.patch_rows.start, one.patch_rows.stop)
        assert torch.equal(batch["masks_weight"][rows], one.patch_weights)


def test_cut_draws_are_the_whole_draw():
    draws = [draw_kept([8, 8], 0.3, torch.Generator().manual_seed(0)), None]
    parts = [cut_draws(draws, group, 4) for group in group_views(3, 2)]
    kept = [part[0][0].sequences + 4 * i for i, part in enumerate(parts[:2])]
    assert sorted(torch.cat(kept).tolist()) == sorted(draws[0][0].sequences.tolist())
    assert all(part[0][0].scale == draws[0][0].scale for part in parts)
    assert torch.equal(parts[2][0][0].sequences, draws[0][1].sequences)
    assert all(part[1] is None for part in parts)


@torch.no_grad()
def unsettled(model):
    """Add noise to the weights: KoLeo's neighbours are rounding noise while all features are nearly equal."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("student.drop_path_rate=0.4",),
        ("train.centering=sinkhorn_knopp", "ibot.separate_head=true", "student.drop_path_rate=0.5"),
        ("crops.local_crops_number=0",),
        ("dino.loss_weight=0",),
        ("ibot.loss_weight=0", "crops.local_crops_number=3"),
        ("ibot.mask_sample_probability=0",),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [4, 1])
def test_losses_and_gradients_do_not_depend_on_the_groups(overrides, batch):
    results = []
    for groups in (1, 2, 4):
        cfg = tiny_config(*overrides, f"train.view_groups={groups}", f"train.batch_size_per_gpu={batch}")
        model = unsettled(SSLMetaArch(cfg)).train()
        losses = model.forward_backward(random_batch(cfg), 0.05, torch.Generator().manual_seed(0))
        results.append((losses, {name: p.grad for name, p in model.student.named_parameters()}))
    (losses, gradients), *others = results
    for other_losses, other_gradients in others:
        assert list(other_losses) == list(losses)
        for name, value in losses.items():
            torch.testing.assert_close(other_losses[name], value, rtol=1e-5, atol=1e-6)
        for name, value in gradients.items():
            same = other_gradients[name]
            assert (same is None) == (value is None), name
            if value is not None:
                torch.testing.assert_close(same, value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_on_last_backward_is_called_once_before_the_last_pass():
    cfg = tiny_config("train.view_groups=3")
    model, events = SSLMetaArch(cfg).train(), []
    model.student["backbone"].norm.weight.register_post_accumulate_grad_hook(lambda p: events.append("backward"))
    model.forward_backward(random_batch(cfg), 0.05, on_last_backward=lambda: events.append("last"))
    assert events == ["backward", "backward", "last", "backward"]


def test_fp16_scaler_scales_every_group():
    cfg = tiny_config("train.view_groups=4")
    plain, scaled = SSLMetaArch(cfg).train(), SSLMetaArch(cfg).train()
    scaled.fp16_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for model in (plain, scaled):
        model.forward_backward(random_batch(cfg), 0.05)
    for a, b in zip(plain.student.parameters(), scaled.student.parameters(), strict=True):
        torch.testing.assert_close(b.grad, 8 * a.grad, rtol=1e-4, atol=1e-6)


def test_auto_makes_fewer_passes_on_a_gpu():
    vit_small, vit_large = 384 * 12, 1024 * 24
    sizes = {"num_local": 8, "tokens_global": 64 * 257, "tokens_local": 64 * 50}
    assert [len(group_views("auto", **sizes, channels=vit_small, device=d)) for d in ("cpu", "cuda", "meta")] == [
        4,
        2,
        2,
    ]
    assert [len(group_views("auto", **sizes, channels=vit_large, device=d)) for d in ("cpu", "cuda")] == [4, 4]


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
    assert len(batch["masks_weight"]) == len(positions)  # the given batch is unchanged


def two_steps(padded: bool, *overrides):
    """Return the state after two steps with EMA: losses, gradients, centres, diagnostics."""
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
    """All parameters have a gradient, that of the separate patch head is zero; no kernel gets an empty batch."""
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
