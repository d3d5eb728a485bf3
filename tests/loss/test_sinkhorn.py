import json
import math

import pytest
import torch
import torch.nn.functional as F

from dinov2_custom.layers import prototype_loss
from dinov2_custom.loss import soft_targets
from dinov2_custom.loss.sinkhorn import sinkhorn_knopp, sinkhorn_targets
from dinov2_custom.loss.soft_targets import TeacherLogits
from tests.test_parallel import facts_of_two

ROWS, K, D = 24, 60, 8


def draws(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def factors(dtype=torch.float32):
    """Return features (ROWS, D) and prototypes (K, D), which are not used equally."""
    weight = 3 * draws(K, D, seed=1) + draws(D, seed=2)
    return F.normalize(draws(ROWS, D), dim=-1).to(dtype), weight.to(dtype)


def reference(logits, temp, iterations=3):
    """Run the paper's algorithm in float64: normalise prototypes and samples alternately."""
    q = torch.exp(logits.double() / temp).T
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True) * prototypes
        q /= q.sum(dim=0, keepdim=True) * samples
    return (q * samples).T.float()


def in_logarithms(logits, temp, iterations=3):
    """Do the same in logarithms, for logits whose exp overflows or underflows."""
    log_q = logits.double() / temp
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp().float()


@pytest.fixture(params=[0, 10, ROWS], ids=["computed", "some kept", "kept"])
def rows_kept(request, monkeypatch):
    """Allow keeping some rows; chunks have 7 rows."""
    monkeypatch.setattr(soft_targets, "_KEPT_LOGITS", request.param * K)
    monkeypatch.setattr(prototype_loss, "_CHUNK_LOGITS", {"cpu": 7 * K})


@pytest.mark.parametrize("iterations", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", [(4, 3), (1, 7), (64, 500)])
def test_it_is_the_algorithm_as_written(shape, iterations):
    logits = draws(*shape)
    got = sinkhorn_knopp(logits, 0.07, iterations)
    torch.testing.assert_close(got, reference(logits, 0.07, iterations), rtol=1e-5, atol=1e-7)


def test_recomputed_logits_equal_kept_ones(rows_kept):
    features, weight = factors()
    expected = reference(features @ weight.T, 0.07)
    with torch.autocast("cpu", torch.bfloat16):  # the student's region, in which rows are computed
        targets = sinkhorn_targets(TeacherLogits.of_factors(features, weight, keep=True), 0.07)
        got = torch.cat([targets.rows(0, 11), targets.rows(11, ROWS)])
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_product_alone(rows_kept, dtype):
    features, weight = factors(dtype)
    got = torch.cat(list(sinkhorn_targets(TeacherLogits.of_factors(features, weight, keep=True), 0.07).chunks()))
    expected = reference((features @ weight.T).float(), 0.07)
    assert (got - expected).norm() < 1e-4 * expected.norm()


def test_rows_of_padding_are_zero_and_change_nothing_else(rows_kept):
    features, weight = factors()
    real_rows = torch.tensor([1.0, 1.0, 0.0] * (ROWS // 3))
    features[real_rows == 0] *= 50  # so large that their exponentials would dominate a sum
    targets = sinkhorn_targets(TeacherLogits.of_factors(features, weight, keep=True), 0.07, real_rows=real_rows)
    got = targets.rows(0, ROWS)
    assert not got[real_rows == 0].any()
    expected = reference(features[real_rows == 1] @ weight.T, 0.07)
    torch.testing.assert_close(got[real_rows == 1], expected, rtol=2e-5, atol=1e-8)


SPREAD = {
    "exp overflows": draws(16, 32, scale=200.0),
    "rows apart": draws(16, 32) + torch.linspace(-500, 500, 16)[:, None],
    "prototypes apart": draws(16, 32) + torch.linspace(-500, 500, 32),
    "a prototype that no row is near": draws(16, 32) - 100 * F.one_hot(torch.tensor(5), 32),
    "a row and a prototype of their own": draws(16, 32).index_fill(0, torch.tensor([3]), -200.0),
    "all equal": torch.full((16, 32), 3.0),
    "equal rows": draws(1, 32).expand(16, 32),
    "one row": draws(1, 32, scale=30.0),
    "one prototype": draws(16, 1, scale=30.0),
}


@pytest.mark.parametrize("name", SPREAD)
def test_wherever_the_logits_lie(name):
    logits = SPREAD[name].clone()
    got = sinkhorn_knopp(logits, 0.04)
    spread = float(logits.abs().max()) / 0.04 * 2**-24  # float32 resolution at the largest exponent
    torch.testing.assert_close(got, in_logarithms(logits, 0.04), rtol=1e-5 + 10 * spread, atol=1e-7)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(len(logits)))


def test_no_rows_or_none_but_padding():
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.07).shape == (0, 5)
    assert not sinkhorn_knopp(draws(3, 5), 0.07, real_rows=torch.zeros(3)).any()


def test_its_input_is_not_changed():
    logits = draws(4, 3)
    before = logits.clone()
    sinkhorn_knopp(logits, 1.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_spreads_to_all_rows(bad):
    """This makes the step be skipped; a centre of 0 or a clamped sum would hide it."""
    logits = draws(6, 5)
    logits[2] = bad
    assert sinkhorn_knopp(logits, 0.07).isnan().all()


TWO = """
import json, math, sys, torch
from dinov2_custom import distributed
from dinov2_custom.loss.sinkhorn import sinkhorn_knopp
distributed.enable()
rank, out = distributed.get_global_rank(), []
for case in json.load(open(f"{sys.argv[1]}/cases")):
    logits, real_rows = (torch.tensor(case[name][rank]) for name in ("logits", "real_rows"))
    got = sinkhorn_knopp(logits.view(-1, 5), 0.07, real_rows=real_rows)
    out.append(got.nan_to_num(-1.0).tolist())
json.dump(out, open(f"{sys.argv[1]}/{rank}.json", "w"))
distributed.disable()
"""


def test_two_processes_balance_their_rows_together(tmp_path):
    logits = draws(9, 5)
    apart = torch.cat((draws(4, 5), draws(5, 5) + 100.0))  # the second's exponentials are e+1400 times the first's
    bad = logits.clone()
    bad[8, 1] = math.nan
    cases = [
        (logits, 4, [1.0] * 9),
        (logits, 9, [1.0] * 9),  # the second has none
        (logits, 4, [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
        (logits, 4, [0.0] * 4 + [1.0] * 5),
        (logits, 4, [0.0] * 9),
        (apart, 4, [1.0] * 9),
        (bad, 4, [1.0] * 9),
    ]
    parts = [{"logits": [x[:n].tolist(), x[n:].tolist()], "real_rows": [real[:n], real[n:]]} for x, n, real in cases]
    (tmp_path / "cases").write_text(json.dumps(parts))
    results = facts_of_two(tmp_path, TWO)
    for (x, _, real), first, second in zip(cases, *results, strict=True):
        got, real = torch.tensor(first + second), torch.tensor(real)
        expected = torch.zeros(9, 5)
        expected[real == 1] = in_logarithms(x[real == 1], 0.07).nan_to_num(-1.0)
        torch.testing.assert_close(got, expected, rtol=1e-3 if x is apart else 1e-5, atol=1e-7)
