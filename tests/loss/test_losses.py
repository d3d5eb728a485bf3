import math

import pytest
import torch
import torch.nn.functional as F

from dinov2_custom.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2_custom.loss.sinkhorn import sinkhorn_knopp


def draws(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def sinkhorn_reference(logits, temp, iterations=3):
    """The algorithm as written in the paper, in float64: normalise prototypes, then samples, over and over."""
    q = torch.exp(logits.double() / temp).T
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True) * prototypes
        q /= q.sum(dim=0, keepdim=True) * samples
    return (q * samples).T


@pytest.mark.parametrize("shape", [(4, 3), (1, 7), (64, 500)])
def test_sinkhorn_equals_the_algorithm_as_written(shape):
    logits = draws(*shape)
    got = sinkhorn_knopp(logits, 0.07, torch.tensor(float(shape[0])))
    torch.testing.assert_close(got, sinkhorn_reference(logits, 0.07).float(), rtol=1e-5, atol=1e-7)


def test_sinkhorn_survives_logits_that_overflow_exp():
    got = sinkhorn_knopp(draws(16, 32, scale=200.0), 0.04, torch.tensor(16.0))
    assert got.isfinite().all()
    torch.testing.assert_close(got.sum(dim=1), torch.ones(16))


def test_sinkhorn_of_no_rows():
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.07, torch.tensor(0.0)).shape == (0, 5)


def test_sinkhorn_leaves_its_input_alone():
    logits = draws(4, 3)
    before = logits.clone()
    sinkhorn_knopp(logits, 1.0, torch.tensor(4.0))
    assert torch.equal(logits, before)


def test_dino_loss_sums_all_pairs():
    loss, students, teachers = DINOLoss(7), [draws(4, 7, seed=s) for s in range(3)], None
    teachers = [draws(4, 7, seed=9).softmax(-1), draws(4, 7, seed=10).softmax(-1)]
    expected = sum(F.cross_entropy(s / 0.1, t) for s in students for t in teachers)
    torch.testing.assert_close(loss(students, teachers), expected)


def test_centre_takes_effect_one_call_later():
    loss = DINOLoss(3)
    logits = torch.tensor([[0.0, 0.07, 0.0], [0.07, 0.14, 0.0], [0.0, 0.0, 0.07], [0.21, 0.0, 0.0]])
    loss.update_center(logits)
    assert torch.equal(loss.center, torch.zeros(1, 3))
    loss.softmax_center_teacher(logits, 0.07)
    torch.testing.assert_close(loss.center, torch.tensor([[0.0070, 0.00525, 0.00175]]))


@pytest.mark.parametrize("real_rows", [None, torch.tensor([1.0] * 9 + [0.0] * 3)], ids=["all", "padded"])
def test_late_targets_are_those_of_the_logits(real_rows):
    features, weight = F.normalize(draws(12, 8), dim=-1), draws(50, 8, seed=1, scale=3.0)
    logits, late, kept, plain = features @ weight.T, *(iBOTPatchLoss(50) for _ in range(3))
    for loss in (late, kept, plain):
        loss.center.copy_(draws(1, 1, 50, seed=2))
    expected = plain.softmax_center_teacher(logits, 0.05)[0]
    expected = expected if real_rows is None else expected * real_rows[:, None]
    plain.update_center(logits, real_rows)
    with torch.autocast("cpu", torch.bfloat16):  # the student's region, in which rows are asked for
        targets = late.late_targets(features, weight, 0.05, real_rows)
        got = torch.cat([targets.rows(0, 5), targets.rows(5, 12)])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.cat(list(targets.chunks())), expected)
    torch.testing.assert_close(kept.soft_targets_(logits.clone(), 0.05, real_rows).rows(0, 12), expected)
    for loss in (late, kept, plain):
        loss.apply_center_update()
    assert not torch.equal(plain.center, draws(1, 1, 50, seed=2))
    torch.testing.assert_close(late.center, plain.center)
    torch.testing.assert_close(kept.center, plain.center)


def test_patch_centre_of_an_empty_batch_stays():
    loss = iBOTPatchLoss(3)
    loss.update_center(torch.zeros(0, 3))
    loss.apply_center_update()
    assert torch.equal(loss.center, torch.zeros(1, 1, 3))


def test_ibot_masked_equals_dense():
    loss, masks = iBOTPatchLoss(5), torch.zeros(4, 9, dtype=torch.bool)
    masks[0, 2:5] = masks[2, 0] = True
    student, teacher = draws(4, 9, 5), draws(4, 9, 5, seed=1).softmax(-1)
    dense = loss(student, teacher, masks)
    masked = loss.forward_masked(student[masks], teacher[masks], masks)
    torch.testing.assert_close(masked, dense)
    padded = loss.forward_masked(
        torch.cat((student[masks], draws(2, 5))),
        torch.cat((teacher[masks], draws(2, 5))),
        masks,
        n_masked_patches=4,
        masks_weight=torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]),
    )
    torch.testing.assert_close(padded, dense)


def test_ibot_without_masks_is_zero_with_zero_gradient():
    student = draws(0, 5).requires_grad_()
    loss = iBOTPatchLoss(5).forward_masked(student, torch.zeros(0, 5), torch.zeros(2, 9, dtype=torch.bool))
    loss.backward()
    assert loss == 0


def test_koleo_golden():
    koleo = KoLeoLoss()
    assert koleo(torch.eye(2)).item() == pytest.approx(-0.3465736, abs=1e-6)
    rows = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])
    assert koleo(rows).item() == pytest.approx(-0.0411433, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_koleo_of_one_image_is_zero(dtype):
    x = draws(1, 8).to(dtype).requires_grad_()
    loss = KoLeoLoss()(x)
    loss.backward()
    assert loss == 0 and x.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_koleo_of_duplicates_is_finite_and_does_not_push_them(dtype):
    x = torch.cat((draws(1, 8).repeat(2, 1), draws(2, 8, seed=1))).to(dtype).requires_grad_()
    loss = KoLeoLoss()(x)
    loss.backward()
    assert math.isfinite(loss.item())
    assert x.grad[:2].abs().max() < 10 * x.grad[2:].abs().max()
