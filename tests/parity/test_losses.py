"""The three loss classes against upstream's, value and gradient, and sinkhorn where upstream's overflows."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dinov2_custom.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss

K, ROWS, GRID = 300, 8, 9


def _logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def _masks() -> torch.Tensor:
    masks = torch.rand(4, GRID, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[2] = False
    return masks


def _with_gradient(call, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = call(*leaves)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def _close(got, expected):
    assert_close(got, expected, rtol=2e-6, atol=1e-7)


def test_dino_loss_is_a_sum_over_pairs_of_crops(oracle):
    students, targets = [_logits(ROWS, 1), _logits(ROWS, 2)], [_logits(ROWS, s).softmax(-1) for s in (3, 4)]
    values = [
        _with_gradient(lambda *s, cls=cls: cls(K)(list(s), targets), *students)
        for cls in (DINOLoss, oracle.dino_loss.DINOLoss)
    ]
    _close(*values)


@pytest.mark.parametrize("arguments", ["masks only", "weights and count"])
def test_ibot_loss_of_masked_patches(oracle, arguments):
    masks = _masks()
    rows = int(masks.sum())
    kwargs = {}
    if arguments == "weights and count":
        weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
        kwargs = {"n_masked_patches": rows, "masks_weight": weights}
    targets = _logits(rows, 5).softmax(-1)
    values = [
        _with_gradient(
            lambda s, cls=cls: cls(K).forward_masked(s, targets, student_masks_flat=masks, **kwargs), student
        )
        for cls, student in ((iBOTPatchLoss, _logits(rows, 6)), (oracle.ibot_loss.iBOTPatchLoss, _logits(rows, 6)))
    ]
    _close(*values)


def test_ibot_loss_of_all_patches(oracle):
    student, targets = _logits(4 * GRID, 7).view(4, GRID, K), _logits(4 * GRID, 8).softmax(-1).view(4, GRID, K)
    values = [
        _with_gradient(lambda s, cls=cls: cls(K)(s, targets, _masks()), student)
        for cls in (iBOTPatchLoss, oracle.ibot_loss.iBOTPatchLoss)
    ]
    _close(*values)


def test_koleo_loss(oracle):
    features = _logits(7, 9)
    _close(_with_gradient(KoLeoLoss(), features), _with_gradient(_quiet(oracle.koleo_loss.KoLeoLoss()), features))


def _quiet(module):
    """Suppress the warning of upstream's CUDA autocast on a CPU."""

    def call(*args):
        with pytest.warns(Warning):
            return module(*args)

    return call


@pytest.mark.parametrize("name, make_rows", [("dino", lambda x: x), ("ibot", lambda x: x.unsqueeze(0))])
def test_centre_follows_upstream_one_call_late(oracle, name, make_rows):
    theirs = (oracle.dino_loss.DINOLoss if name == "dino" else oracle.ibot_loss.iBOTPatchLoss)(K)
    ours = (DINOLoss if name == "dino" else iBOTPatchLoss)(K)
    for step in range(4):
        rows = make_rows(_logits(5 + step, step) + 0.5)
        _close(ours.softmax_center_teacher(rows, 0.05), theirs.softmax_center_teacher(rows, 0.05))
        _close(ours.center, theirs.center)
        ours.update_center(rows)
        theirs.update_center(rows)
    assert float(ours.center.abs().max()) > 0.1


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_sinkhorn(oracle, name):
    logits = _logits(11, 10)
    if name == "dino":
        got, expected = (cls(K).sinkhorn_knopp_teacher(logits, 0.05) for cls in (DINOLoss, oracle.dino_loss.DINOLoss))
    else:
        count = torch.tensor([len(logits)])
        got, expected = (
            cls(K).sinkhorn_knopp_teacher(logits, 0.05, n_masked_patches_tensor=count.clone())
            for cls in (iBOTPatchLoss, oracle.ibot_loss.iBOTPatchLoss)
        )
    assert_close(got, expected, rtol=2e-5, atol=1e-8)


def test_sinkhorn_of_huge_logits_is_right_where_upstreams_overflows(oracle):
    logits = _logits(64, 11) + 3.0
    assert not oracle.dino_loss.DINOLoss(K).sinkhorn_knopp_teacher(logits, 0.04).isfinite().all()
    got = DINOLoss(K).sinkhorn_knopp_teacher(logits, 0.04)
    assert_close(got, _sinkhorn_in_logs(logits, 0.04), rtol=1e-4, atol=1e-7)
    assert float(logits.max()) / 0.04 > 120


def test_sinkhorn_of_few_widely_spread_rows(oracle):
    """Logits of +-2.5 at temperature .04, 8 rows: below upstream's overflow, so upstream's figures stand."""
    logits = 5.0 * torch.rand(8, 4096, generator=torch.Generator().manual_seed(1)) - 2.5
    expected = _sinkhorn_in_logs(logits, 0.04)
    upstream = oracle.dino_loss.DINOLoss(4096).sinkhorn_knopp_teacher(logits, 0.04)
    assert float((upstream - expected).norm() / expected.norm()) < 1e-5
    got = DINOLoss(4096).sinkhorn_knopp_teacher(logits, 0.04)
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_sinkhorn_of_absurd_logits_stays_a_distribution():
    got = DINOLoss(K).sinkhorn_knopp_teacher(1e4 * _logits(11, 12), 0.04)
    assert got.isfinite().all()
    assert_close(got.sum(-1), torch.ones(11))


def _sinkhorn_in_logs(logits: torch.Tensor, temp: float) -> torch.Tensor:
    """Run three iterations in float64 logarithms: slow, but without overflow."""
    log_q = logits.double() / temp
    rows, prototypes = log_q.shape
    for _ in range(3):
        log_q = log_q - log_q.logsumexp(0, keepdim=True) - torch.tensor(prototypes).log()
        log_q = log_q - log_q.logsumexp(1, keepdim=True) - torch.tensor(rows).log()
    return (log_q.exp() * rows).float()
