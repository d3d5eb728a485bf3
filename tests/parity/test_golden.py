"""Figures measured on upstream's later revision (b8931f7), as literals: usable where the oracle is unavailable."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from dinov2_custom.layers.dino_head import DINOHead
from dinov2_custom.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2_custom.models import vision_transformer as vits

TEACHER = torch.tensor([[0, 0.07, 0], [0.07, 0.14, 0], [0, 0, 0.07], [0.21, 0, 0]])
STUDENT = torch.tensor([[0.1, 0, 0], [0, 0.2, 0], [0, 0, 0.1], [0.3, 0, 0]])
SOFTMAX = torch.tensor(
    [
        [0.2119416, 0.5761169, 0.2119416],
        [0.2447285, 0.6652409, 0.0900306],
        [0.2119416, 0.2119416, 0.5761169],
        [0.9094430, 0.0452785, 0.0452785],
    ]
)
SINKHORN = torch.tensor(
    [
        [0.1419680, 0.5068179, 0.3512141],
        [0.1824804, 0.6514450, 0.1660746],
        [0.1106432, 0.1453088, 0.7440479],
        [0.8413585, 0.0550129, 0.1036285],
    ]
)


def _close(got, expected):
    assert_close(got, expected, rtol=0, atol=1.5e-7)


def test_softmax_of_centred_logits():
    _close(DINOLoss(3).softmax_center_teacher(TEACHER, 0.07), SOFTMAX)
    _close(iBOTPatchLoss(3).softmax_center_teacher(TEACHER[None], 0.07), SOFTMAX[None])


def test_centre_after_one_update():
    loss = DINOLoss(3)
    loss.update_center(TEACHER)
    loss.apply_center_update()
    _close(loss.center, torch.tensor([[0.0070, 0.00525, 0.00175]]))


def test_sinkhorn():
    _close(DINOLoss(3).sinkhorn_knopp_teacher(TEACHER, 0.07), SINKHORN)
    _close(iBOTPatchLoss(3).sinkhorn_knopp_teacher(TEACHER, 0.07, torch.tensor([4])), SINKHORN)


def test_dino_loss():
    assert float(DINOLoss(3)([STUDENT], [SOFTMAX])) == pytest.approx(0.8976220, abs=2e-7)


def test_ibot_loss():
    masks = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    loss = iBOTPatchLoss(3).forward_masked(STUDENT[:3], SOFTMAX[:3], student_masks_flat=masks)
    assert float(loss) == pytest.approx(0.6998703, abs=2e-7)


@pytest.mark.parametrize(
    "features, expected",
    [
        (torch.eye(2), -0.3465736),
        (torch.eye(4), -0.3465736),
        (torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1]]), -0.0411433),
    ],
)
def test_koleo(features, expected):
    assert float(KoLeoLoss()(features)) == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize("width", [384, 1024])
def test_koleo_of_one_sample_is_zero_by_decision(width):
    """Upstream returns 15.4 or 14.9, and inf in fp16, which has no meaning."""
    assert float(KoLeoLoss()(torch.randn(1, width))) == 0.0


@pytest.mark.parametrize(
    "block_chunks, names",
    [(4, ["blocks.0.0.", "blocks.1.3.", "blocks.3.11."]), (1, ["blocks.0.11."]), (0, ["blocks.11."])],
)
def test_names_of_chunked_blocks_count_globally(block_chunks, names):
    with torch.device("meta"):
        keys = vits.vit_small(block_chunks=block_chunks, init_values=1.0, drop_path_uniform=True).state_dict()
    for name in names:
        assert sum(key.startswith(name) for key in keys) == 14


def test_prototypes_start_at_the_width_of_a_linear_layer():
    weight = DINOHead(64, 4096, hidden_dim=64, bottleneck_dim=256).state_dict()
    assert float(weight["last_layer.weight_v"].std()) == pytest.approx(0.0361, abs=3e-4)
    assert float(weight["last_layer.weight_v"].std()) == pytest.approx(1 / math.sqrt(3 * 256), rel=0.01)
    assert torch.equal(weight["last_layer.weight_g"], torch.ones(4096, 1))
