import math

import pytest
import torch

from dinov2_custom.layers import prototype_loss
from dinov2_custom.loss import soft_targets
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.views import pad_patches
from tests.train.batches import random_batch, tiny_config
from tests.train.test_views import unsettled

DINO_TERMS = {"dino_local_crops_loss", "dino_global_crops_loss"}
TERMS = DINO_TERMS | {"koleo_loss", "ibot_loss"}


def step(*overrides, batch=None, seed=0):
    cfg = tiny_config(*overrides)
    model = SSLMetaArch(cfg).train()
    model.prepare_for_distributed_training()
    losses = model.forward_backward(random_batch(cfg, seed, batch), teacher_temp=0.05, generator=torch.Generator())
    return model, losses


def gradients_are_finite(model):
    return all(p.grad.isfinite().all() for p in model.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("separate", ["true", "false"])
def test_all_terms_and_finite_gradients(centering, separate):
    model, losses = step(f"train.centering={centering}", f"ibot.separate_head={separate}")
    assert set(losses) == TERMS
    assert all(math.isfinite(v) for v in losses.values())
    without = [n for n, p in model.student.named_parameters() if p.grad is None]
    assert without == [] and gradients_are_finite(model)
    assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_bf16_stays_close_to_fp32(part):
    overrides = [
        f"compute_precision.{part}.{name}.mixed_precision.param_dtype=bf16"
        for name in ("backbone", "dino_head", "ibot_head")
    ]
    _, expected = step()
    model, losses = step(*overrides)
    assert gradients_are_finite(model)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=0.03, abs=0.03)


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        (["dino.loss_weight=0"], TERMS - DINO_TERMS),
        (["dino.loss_weight=0", "ibot.separate_head=true"], TERMS - DINO_TERMS),
        (["ibot.loss_weight=0"], TERMS - {"ibot_loss"}),
        (["ibot.loss_weight=0", "train.centering=sinkhorn_knopp"], TERMS - {"ibot_loss"}),
        (["dino.koleo_loss_weight=0"], TERMS - {"koleo_loss"}),
        (["crops.local_crops_number=0"], TERMS - {"dino_local_crops_loss"}),
        (["ibot.mask_sample_probability=0"], TERMS),
    ],
)
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_terms_can_be_switched_off(overrides, terms, centering):
    model, losses = step(*overrides, f"train.centering={centering}")
    assert set(losses) == terms
    assert all(math.isfinite(v) for v in losses.values())
    assert gradients_are_finite(model)


def test_one_image_a_process_and_duplicates():
    model, losses = step(batch=1)
    assert losses["koleo_loss"] == 0 and gradients_are_finite(model)
    cfg = tiny_config()
    model, batch = SSLMetaArch(cfg).train(), random_batch(cfg)
    for key in ("collated_global_crops", "collated_local_crops"):
        batch[key] = batch[key][:1].expand_as(batch[key]).clone()
    losses = model.forward_backward(batch, teacher_temp=0.05)
    assert math.isfinite(losses["koleo_loss"]) and gradients_are_finite(model)


def test_start_values_are_those_of_uniform_assignments():
    head = ("dino.head_n_prototypes=4096", "dino.head_hidden_dim=256", "dino.head_bottleneck_dim=256")
    cfg = tiny_config("crops.local_crops_number=8", *head)
    model, batch = SSLMetaArch(cfg).train(), random_batch(cfg)
    losses = model.forward_backward(batch, teacher_temp=0.05)
    ln_k = math.log(4096)
    assert losses["dino_local_crops_loss"] == pytest.approx(ln_k * 16 / 18, rel=0.1)
    assert losses["dino_global_crops_loss"] == pytest.approx(ln_k * 2 / 18, rel=0.1)
    assert losses["ibot_loss"] == pytest.approx(ln_k / 4, rel=0.1)


def test_weights_are_a_function_of_the_seed_and_teacher_starts_equal():
    torch.manual_seed(1)
    first = SSLMetaArch(tiny_config())
    state = torch.get_rng_state()
    second = SSLMetaArch(tiny_config())
    assert torch.equal(state, torch.get_rng_state())
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(first.student.parameters(), first.teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    other = SSLMetaArch(tiny_config("train.seed=1"))
    assert not torch.equal(first.student["backbone"].pos_embed, other.student["backbone"].pos_embed)


def test_teacher_moves_by_the_formula():
    model = SSLMetaArch(tiny_config())
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
    before = [p.clone() for p in model.teacher.parameters()]
    model.update_teacher(0.9)
    for old, new, s in zip(before, model.teacher.parameters(), model.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * s)


@pytest.mark.parametrize("momentum", [0.9, 0.992, 0.9999, 1.0])
def test_teacher_moves_as_by_lerp_to_the_bit_unless_the_step_is_left_out(momentum):
    model = SSLMetaArch(tiny_config())
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(torch.randn_like(p))
    sides = [[p.detach().clone() for p in side.parameters()] for side in (model.teacher, model.student)]
    for left_out in (1.0, 0.0):
        model.update_teacher(momentum, skip=torch.tensor(left_out))
        wanted = sides[0] if left_out else [t.lerp(s, 1 - momentum) for t, s in zip(*sides, strict=True)]
        assert all(map(torch.equal, model.teacher.parameters(), wanted))
        assert all(map(torch.equal, model.student.parameters(), sides[1]))


def test_train_and_eval_leave_the_teacher_in_eval():
    model = SSLMetaArch(tiny_config())
    assert model.train().student.training and not model.teacher.training
    assert not model.eval().student.training


def test_drop_path_follows_the_generator_not_the_global_state():
    cfg = tiny_config("student.drop_path_rate=0.5")
    batch = random_batch(cfg)

    def losses(seed, global_seed):
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(seed)
        return SSLMetaArch(cfg).train().forward_backward(batch, teacher_temp=0.05, generator=generator)

    assert losses(1, 0) == losses(1, 1)
    assert losses(1, 0) != losses(2, 0)


def test_diagnostics_distinguish_uniform_from_decided():
    cfg = tiny_config()
    model = SSLMetaArch(cfg).train()
    model.diagnose = True
    model.forward_backward(random_batch(cfg), teacher_temp=100.0)
    assert model.diagnostics["teacher_entropy"] == pytest.approx(math.log(32), rel=1e-3)
    model.forward_backward(random_batch(cfg), teacher_temp=1e-4)
    assert model.diagnostics["teacher_entropy"] < 0.1


@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_equal_one_large_batch(count):
    """This holds for centering, but not for KoLeo, whose neighbours are those of the micro-batch."""
    cfg = tiny_config("train.batch_size_per_gpu=8", "dino.koleo_loss_weight=0")
    large = random_batch(cfg)
    whole, parts = SSLMetaArch(cfg).train(), SSLMetaArch(cfg).train()
    for _ in range(2):  # the second step uses the centres updated by the first one
        expected = whole.forward_backward(large, teacher_temp=0.05)
        sums = dict.fromkeys(expected, 0.0)
        for index in range(count):
            losses = parts.forward_backward(slice_of(large, 8, index, count), 0.05, micro_batch=(index, count))
            sums = {name: sums[name] + losses[name] / count for name in sums}
        for name, value in expected.items():
            torch.testing.assert_close(sums[name], value, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(whole.student.named_parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert whole.dino_loss.center.abs().max() > 0
    torch.testing.assert_close(parts.dino_loss.center, whole.dino_loss.center)
    torch.testing.assert_close(parts.ibot_patch_loss.center, whole.ibot_patch_loss.center)


def slice_of(batch, size, index, count):
    """Return the ``index``-th of ``count`` equal parts of a collated batch of ``size`` images."""
    part = size // count

    def crops(x, copies):
        return x.unflatten(0, (copies, size))[:, index * part : (index + 1) * part].flatten(0, 1)

    masks = crops(batch["collated_masks"], 2)
    weights = (1 / masks.sum(dim=1).clamp_min(1)).unsqueeze(1).expand_as(masks)[masks]
    return {
        "collated_global_crops": crops(batch["collated_global_crops"], 2),
        "collated_local_crops": crops(batch["collated_local_crops"], 2),
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": weights,
        "upperbound": int(masks.sum()),
        "n_masked_patches": masks.sum().reshape(1),
    }


@pytest.mark.parametrize("lean", ["true", "false"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(mode, lean):
    results = []
    for setting in ("none", mode):
        cfg = tiny_config(
            f"train.activation_checkpointing={setting}", f"train.lean={lean}", "student.drop_path_rate=0.3"
        )
        model = SSLMetaArch(cfg).train()
        model.prepare_for_distributed_training()
        model.forward_backward(random_batch(cfg), 0.05, torch.Generator().manual_seed(0))
        results.append([p.grad for p in model.student.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def targets_of_two_batches(lean, padded, *overrides):
    """Return the targets of a second batch, after a first one has updated the centres."""
    cfg = tiny_config(f"train.lean={lean}", *overrides)
    model = unsettled(SSLMetaArch(cfg)).train()
    model.constant_shapes = padded
    for seed in (0, 1):
        images = random_batch(cfg, seed)
        if padded:
            images, _ = pad_patches(images | {"upperbound": images["upperbound"] + 5}, 0, apart=False)
        targets = model.get_teacher_output(images, 0.05)
    return targets


@pytest.mark.parametrize("kept", [0, 3, 2**26], ids=["none kept", "some kept", "kept"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize(
    "overrides", [(), ("ibot.separate_head=true",), ("dino.loss_weight=0",), ("ibot.loss_weight=0",)], ids=str
)
def test_lazy_targets_are_the_definitions(monkeypatch, overrides, centering, padded, kept):
    monkeypatch.setattr(soft_targets, "_KEPT_LOGITS", kept * 32)
    monkeypatch.setattr(prototype_loss, "_CHUNK_LOGITS", {"cpu": 5 * 32})
    overrides = (*overrides, f"train.centering={centering}")
    expected, got = (targets_of_two_batches(lean, padded, *overrides) for lean in ("false", "true"))
    for one, other in zip(expected, got, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(torch.cat(list(other.chunks())), one, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_lazy_targets_in_bf16(monkeypatch, centering):
    """Both paths round the same logits to bf16 and nothing else, but one centre sums them before rounding."""
    monkeypatch.setattr(soft_targets, "_KEPT_LOGITS", 3 * 32)
    overrides = ("compute_precision.teacher.dino_head.mixed_precision.param_dtype=bf16", f"train.centering={centering}")
    expected, got = (targets_of_two_batches(lean, False, *overrides) for lean in ("false", "true"))
    for one, other in zip(expected, got, strict=True):
        assert (torch.cat(list(other.chunks())) - one).norm() < 1e-3 * one.norm()
