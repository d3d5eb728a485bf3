import pytest
import torch
import torch.nn.functional as F

from dinov2_custom.layers import prototype_loss
from dinov2_custom.loss import DINOLoss, iBOTPatchLoss, soft_targets
from dinov2_custom.loss.soft_targets import SoftTargets, TeacherLogits

K, D = 50, 8
PADDED = torch.tensor([1.0] * 9 + [0.0] * 3)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(rows=12, dtype=torch.float32):
    """Return features (rows, D) and prototypes (K, D)."""
    return F.normalize(draws(rows, D), dim=-1).to(dtype), 3 * draws(K, D, seed=1).to(dtype)


@pytest.fixture(params=[0, 7, 12], ids=["computed", "some kept", "kept"])
def rows_kept(request, monkeypatch):
    """Allow keeping the logits of some rows; chunks have 5 rows."""
    monkeypatch.setattr(soft_targets, "_KEPT_LOGITS", request.param * K)
    monkeypatch.setattr(prototype_loss, "_CHUNK_LOGITS", {"cpu": 5 * K})
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [True, False])
def test_logits_are_the_product_wherever_they_come_from(rows_kept, keep, dtype):
    features, weight = factors(dtype=dtype)
    logits = TeacherLogits.of_factors(features, weight, keep)
    assert len(logits) == 12 and len(logits.kept) == rows_kept * keep and logits.num_prototypes == K
    assert logits.kept.dtype == dtype and (logits.weight is None) == (len(logits.kept) == 12)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-8}
    for start, stop in ((0, 7), (5, 9), (7, 12), (12, 12)):
        got = logits.rows(start, stop)
        torch.testing.assert_close(got, (features[start:stop] @ weight.T).float(), **tolerance)
        got.zero_()  # it owns its memory
    torch.testing.assert_close(logits.rows(0, 12), (features @ weight.T).float(), **tolerance)
    assert [(rows.start, rows.stop) for rows in logits.chunks()] == [(0, 5), (5, 10), (10, 12)]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("real_rows", [None, PADDED], ids=["all", "padded"])
@pytest.mark.parametrize(("cls", "shape"), [(DINOLoss, (1, K)), (iBOTPatchLoss, (1, 1, K))])
def test_lazy_targets_are_those_of_the_logits(rows_kept, real_rows, keep, cls, shape):
    (features, weight), late, plain = factors(), cls(K), cls(K)
    for loss in (late, plain):
        loss.center.copy_(draws(*shape, seed=2))
    logits = features @ weight.T
    expected = plain.softmax_center_teacher(logits, 0.05).view_as(logits)
    expected = expected if real_rows is None else expected * real_rows[:, None]
    plain.update_center(logits, real_rows)
    with torch.autocast("cpu", torch.bfloat16):  # the student's region, in which rows are computed
        targets = late.lazy_targets(features, weight, 0.05, real_rows, keep)
        got = torch.cat([targets.rows(0, 5), targets.rows(5, 12)])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.cat(list(targets.chunks())), expected)
    torch.testing.assert_close(targets.sum(), expected.sum(dim=0), rtol=1e-5, atol=1e-6)
    for loss in (late, plain):
        loss.apply_center_update()
    assert not torch.equal(plain.center, draws(*shape, seed=2))
    torch.testing.assert_close(late.center, plain.center)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 100.0])
def test_targets_are_float32_softmaxes_of_the_logits_whatever_their_precision(dtype, spread):
    logits = (spread * draws(3, 131_072)).to(dtype)
    got = SoftTargets(TeacherLogits(logits), torch.zeros(131_072), 0.04).rows(0, 3)
    expected = torch.softmax(logits.double() / 0.04, dim=-1)
    assert (got - expected).abs().sum(dim=1).max() < 1e-4  # 2e-7 unless exponents are in the thousands
    torch.testing.assert_close(got.sum(dim=1), torch.ones(3), rtol=1e-5, atol=0)
