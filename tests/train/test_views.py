import pytest
import torch

from dinov2_custom.layers.drop_path import draw_kept
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.views import cut_draws, cut_views, group_views
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
    """Add noise to the weights: KoLeo's neighbours are rounding noise while all features are alike."""
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
