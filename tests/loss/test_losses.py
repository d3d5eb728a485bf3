import math

import pytest
import torch
import torch.nn.functional as F

from dinov2_custom.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss


def draws(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


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


def test_ibot_counts_patches_exactly_whatever_the_targets_precision():
    loss, masks = iBOTPatchLoss(5), torch.ones(1, 511, dtype=torch.bool)  # bf16 has 510 and 512
    student, teacher = draws(1, 511, 5), draws(1, 511, 5, seed=1).softmax(-1).bfloat16()
    torch.testing.assert_close(loss(student, teacher, masks), loss(student, teacher.float(), masks))


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


def test_koleo_of_opposite_features_is_that_of_the_farthest():
    """Their cosine may be rounded to below -1, which must not make a feature its own neighbour."""
    rows = draws(100, 1, 8)
    for row in rows:
        assert KoLeoLoss()(torch.cat((row, -row))).item() == pytest.approx(-math.log(2), abs=1e-6)


def test_koleo_gradient_by_finite_differences(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # otherwise the differences are rounding
    assert torch.autograd.gradcheck(KoLeoLoss(), draws(6, 5).double().requires_grad_())


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
