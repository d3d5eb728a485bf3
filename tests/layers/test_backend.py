import pytest
import torch

from dinov2_custom.layers import backend


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_products_equal_sdpa(dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 16, generator=g).to(dtype) for _ in range(3))
    fused = backend.attention(q, k, v, backend="sdpa")
    plain = backend.attention(q, k, v, backend="products")
    torch.testing.assert_close(plain, fused, rtol=tolerance, atol=tolerance)


def test_auto_takes_products_on_cpu_bf16_only():
    q = torch.zeros(1, 1, 8, 4)
    assert backend.choose(q) == "sdpa"
    assert backend.choose(q.bfloat16()) == "products"
    assert backend.choose(torch.zeros(1, 1, 2000, 4, dtype=torch.bfloat16)) == "sdpa"


def test_unknown_backend_is_refused():
    q = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match="expected one of"):
        backend.attention(q, q, q, backend="cuda")


def test_xformers_disabled_by_environment(monkeypatch):
    monkeypatch.setenv("XFORMERS_DISABLED", "1")
    backend.xformers_ops.cache_clear()
    q = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match="no xformers"):
        backend.attention(q, q, q, backend="xformers")
    backend.xformers_ops.cache_clear()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", backend.BACKENDS)
@pytest.mark.parametrize("sequences, length", [(0, 7), (3, 0)])
def test_nothing_to_attend_from_has_an_empty_result_and_gradients(name, sequences, length, autocast):
    """As of a drop-path subset without a sequence; some kernels return None."""
    q = torch.zeros(sequences, 2, length, 16, requires_grad=True)
    k, v = (torch.zeros(sequences, 2, 7, 16, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = backend.attention(q, k, v, backend=name)
    assert out.shape == q.shape and out.dtype == (torch.bfloat16 if autocast else torch.float32)
    out.sum().backward()
    assert all(one.grad is not None and not one.grad.any() for one in (q, k, v))
