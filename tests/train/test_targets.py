"""The teacher's targets in the two ways to compute them; what comes of them: test_ssl_meta_arch.py, parity/."""

import pytest
import torch

from dinov2_custom.layers import prototype_loss
from dinov2_custom.loss import soft_targets
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.views import pad_patches
from tests.train.batches import random_batch, tiny_config
from tests.train.test_views import unsettled


def targets_of_two_batches(lean, padded, *overrides):
    """Return the targets of a second batch, when a first has moved the centres."""
    cfg = tiny_config(f"train.lean={lean}", *overrides)
    model = unsettled(SSLMetaArch(cfg)).train()
    model.constant_shapes = padded
    for seed in (0, 1):
        images = random_batch(cfg, seed)
        if padded:
            images, _ = pad_patches(images | {"upperbound": images["upperbound"] + 5}, 0, apart=False)
        targets = model.teacher_targets(images, 0.05)
    return targets


@pytest.mark.parametrize("kept", [0, 3, 2**26], ids=["none kept", "some kept", "kept"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize(
    "overrides", [(), ("ibot.separate_head=true",), ("dino.loss_weight=0",), ("ibot.loss_weight=0",)], ids=str
)
def test_late_targets_are_the_definitions(monkeypatch, overrides, centering, padded, kept):
    monkeypatch.setattr(soft_targets, "_KEPT_LOGITS", kept * 32)
    monkeypatch.setattr(prototype_loss, "_CHUNK_LOGITS", {"cpu": 5 * 32})
    overrides = (*overrides, f"train.centering={centering}")
    expected, got = (targets_of_two_batches(lean, padded, *overrides) for lean in ("false", "true"))
    for one, other in zip(expected, got, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(torch.cat(list(other.chunks())), one, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_in_bf16_too(monkeypatch, centering):
    """Both ways round the same logits to bf16 and nothing after them, but one centre sums them before they are."""
    monkeypatch.setattr(soft_targets, "_KEPT_LOGITS", 3 * 32)
    overrides = ("compute_precision.teacher.dino_head.mixed_precision.param_dtype=bf16", f"train.centering={centering}")
    expected, got = (targets_of_two_batches(lean, False, *overrides) for lean in ("false", "true"))
    for one, other in zip(expected, got, strict=True):
        assert (torch.cat(list(other.chunks())) - one).norm() < 1e-3 * one.norm()
