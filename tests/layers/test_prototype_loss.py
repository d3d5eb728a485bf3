import pytest
import torch
import torch.nn.functional as F

from dinov2_custom.layers import DINOHead, prototype_loss
from dinov2_custom.layers.prototype_loss import PrototypeJob, chunk_size, prototype_cross_entropy
from dinov2_custom.layers.weight_norm import normalised

K, D = 37, 6


def draws(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype=torch.float32):
    """Return features of two jobs, 3 views of 4 rows and 1 of 5; prototypes; targets summing to 2 and to 1; weights."""
    features = F.normalize(draws(17, D, dtype=dtype), dim=-1)
    targets = [2 * draws(4, K, seed=1, dtype=dtype).softmax(-1), draws(5, K, seed=2, dtype=dtype).softmax(-1)]
    weights = [draws(4, seed=3).abs().to(dtype), draws(5, seed=4).abs().to(dtype)]
    return features, draws(K, D, seed=5, dtype=dtype), draws(K, 1, seed=6, dtype=dtype), targets, weights


def jobs_of(targets, weights):
    return [
        PrototypeJob(lambda a, b: targets[0][a:b].clone(), 4, weights[0], num_views=3, mass=2.0),
        PrototypeJob(lambda a, b: targets[1][a:b].clone(), 5, weights[1], temperature=0.2),
    ]


def plain(features, v, g, targets, weights):
    """Compute the loss by definition: all logits, log-softmax, cross-entropy."""
    logits = F.linear(features, v * (g / v.norm(dim=1, keepdim=True)))
    first = F.log_softmax(logits[:12] / 0.1, dim=-1).unflatten(0, (3, 4))
    second = F.log_softmax(logits[12:] / 0.2, dim=-1)
    losses = [
        -((targets[0] * first).sum(-1) * weights[0]).sum(),
        -((targets[1] * second).sum(-1) * weights[1]).sum(),
    ]
    return sum(losses), torch.stack(losses)


def with_gradients(call, features, v, g, *rest):
    leaves = [x.clone().requires_grad_() for x in (features, v, g)]
    loss, losses = call(*leaves, *rest)
    return loss.detach(), losses.detach(), torch.autograd.grad(3.0 * loss, leaves)


@pytest.fixture(
    params=[(1, 1), (K, 4 * K), (7 * K, 2**22), (2**22, 2**22)],
    ids=["a row a chunk", "4 rows a product", "7 rows a chunk", "one chunk"],
)
def chunks(request, monkeypatch):
    monkeypatch.setattr(prototype_loss, "_CHUNK_LOGITS", {"cpu": request.param[0]})
    monkeypatch.setattr(prototype_loss, "_PRODUCT_LOGITS", {"cpu": request.param[1]})


@pytest.mark.parametrize("chunk_loss", [prototype_loss.chunk_cross_entropy, prototype_loss.fused_cross_entropy])
def test_loss_and_gradients_equal_the_plain_path(chunks, chunk_loss):
    features, v, g, targets, weights = inputs()
    expected = with_gradients(plain, features, v, g, targets, weights)
    got = with_gradients(lambda *x: prototype_cross_entropy(*x, jobs_of(targets, weights), chunk_loss), features, v, g)
    for one, other in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(prototype_loss, "_CHUNK_LOGITS", {"cpu": 3 * K})
    monkeypatch.setattr(prototype_loss, "_ACCUMULATE", torch.float64)
    features, v, g, targets, weights = inputs(torch.float64)
    leaves = [x.requires_grad_() for x in (features, v, g)]
    jobs = jobs_of(targets, weights)
    assert torch.autograd.gradcheck(lambda *x: prototype_cross_entropy(*x, jobs)[0], leaves)


def test_frozen_prototypes_and_no_grad():
    features, v, g, targets, weights = inputs()
    jobs = jobs_of(targets, weights)
    features.requires_grad_()
    loss, _ = prototype_cross_entropy(features, v, g, jobs)
    loss.backward()
    assert features.grad is not None and v.grad is None
    with torch.no_grad():
        same, _ = prototype_cross_entropy(features, v, g, jobs)
    torch.testing.assert_close(same, loss.detach())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.01)])
def test_half_precision_is_close(dtype, tolerance):
    features, v, g, targets, weights = inputs()
    expected = with_gradients(plain, features, v, g, targets, weights)

    def half(z, v, g):
        return prototype_cross_entropy(z.to(dtype), v, g, jobs_of(targets, weights))

    loss, _, gradients = with_gradients(half, features, v, g)
    assert float(loss) == pytest.approx(float(expected[0]), rel=tolerance)
    for got, want in zip(gradients, expected[2], strict=True):
        assert (got - want).norm() < tolerance * want.norm()


def test_no_rows():
    _, v, g, *_ = inputs()
    features = torch.zeros(0, D, requires_grad=True)
    job = PrototypeJob(lambda a, b: torch.zeros(b - a, K), 0, torch.zeros(0))
    v.requires_grad_()
    loss, losses = prototype_cross_entropy(features, v, g, [job])
    loss.backward()
    assert loss == 0 and losses.tolist() == [0.0] and not v.grad.any()


def test_nothing_as_large_as_the_logits_is_kept():
    """With twice the rows, saved memory grows only by their features."""
    head = DINOHead(8, 512, hidden_dim=8, bottleneck_dim=4)

    def kept_bytes(rows):
        kept = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        job = PrototypeJob(lambda a, b: torch.full((b - a, 512), 1 / 512), rows, torch.ones(rows))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            keep = head.cross_entropy(torch.randn(rows, 8), [job])  # noqa: F841 - the graph
        return sum(kept.values())

    assert kept_bytes(200) - kept_bytes(100) < 100 * 512 * 4 / 8


def test_weight_norm_in_pieces():
    v, g = draws(20_000, 3), draws(20_000, 1, seed=1)
    torch.testing.assert_close(normalised(v, g, torch.float32), g * F.normalize(v, dim=1))
    assert normalised(v, g, torch.bfloat16).dtype == torch.bfloat16


def test_chunks_have_at_least_one_row():
    assert chunk_size(2**30, torch.device("cpu")) == 1
    assert chunk_size(65_536, torch.device("cuda")) == 256
