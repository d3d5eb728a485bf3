"""Which kernel computes attention. xformers has none for a CPU: the tests use the real package where that matters, and
elsewhere a stand-in with its signature and layout.
"""

import contextlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dinov2_custom.layers import attention, backend, block, swiglu_ffn
from tests.oracle import package_or_skip

REPOSITORY = Path(__file__).resolve().parents[2]


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


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """Compute what xformers does: (B, length, heads, head_dim) throughout."""
    assert attn_bias is scale is op is output_dtype is None and p == 0.0
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


@contextlib.contextmanager
def xformers_with(kernel):
    """Make ``import xformers.ops`` return a module whose ``memory_efficient_attention`` is ``kernel``."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "xformers", package)
        patch.setitem(sys.modules, "xformers.ops", ops)
        patch.delenv("XFORMERS_DISABLED", raising=False)
        backend.xformers_ops.cache_clear()
        yield ops
    backend.xformers_ops.cache_clear()


@pytest.fixture
def xformers():
    with xformers_with(memory_efficient_attention) as ops:
        yield ops


@pytest.fixture
def no_xformers(monkeypatch):
    monkeypatch.setenv("XFORMERS_DISABLED", "1")
    backend.xformers_ops.cache_clear()
    yield
    backend.xformers_ops.cache_clear()


def flags():
    modules = attention, block, swiglu_ffn
    return {(m.XFORMERS_ENABLED, m.XFORMERS_AVAILABLE) for m in modules}


CPU = 4, 16, torch.float32, torch.device("cpu")


def test_xformers_disabled_by_environment(no_xformers):
    q = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match="no xformers"):
        backend.attention(q, q, q, backend="xformers")
    assert flags() == {(False, False)}
    assert backend.fastest_attention([(2, 5)], *CPU)[0] == "auto"


def test_upstreams_names_of_xformers(xformers):
    assert flags() == {(True, True)}
    from dinov2.layers.attention import XFORMERS_AVAILABLE

    assert XFORMERS_AVAILABLE
    with pytest.raises(AttributeError, match="XFORMERS_VERSION"):
        attention.XFORMERS_VERSION  # noqa: B018


def test_xformers_kernel_gets_its_layout(xformers):
    qkv = torch.randn(2, 7, 3, 4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    results = []
    for name in ("sdpa", "xformers"):
        out = backend.attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), backend=name)
        results.append((out, *torch.autograd.grad((out**2).sum(), qkv)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("theirs", "wanted"), [(1.0, "xformers"), (3.0, "auto")])
def test_the_faster_kernel_is_chosen(xformers, monkeypatch, theirs, wanted):
    monkeypatch.setattr(backend, "_seconds", lambda name, *_: {"auto": 2.0, "xformers": theirs}[name])
    assert backend.fastest_attention([(2, 5), (4, 3)], *CPU)[0] == wanted


def test_both_kernels_are_timed_on_every_shape(xformers):
    seen = []

    def watched(query, *args, **kwargs):
        seen.append(tuple(query.shape))
        return memory_efficient_attention(query, *args, **kwargs)

    xformers.memory_efficient_attention = watched
    chosen, line = backend.fastest_attention([(2, 5), (8, 3)], *CPU)
    assert set(seen) == {(2, 5, 4, 16), (8, 3, 4, 16)} and chosen in ("auto", "xformers") and line.count(" ms") == 2


WITH_THE_REAL_ONE = """
import inspect, json, sys
import torch
from dinov2_custom.layers import attention, backend
assert "xformers" not in sys.modules
found = {"available": attention.XFORMERS_AVAILABLE, "file": sys.modules["xformers.ops"].__file__}
found["parameters"] = list(inspect.signature(backend.xformers_ops().memory_efficient_attention).parameters)
found["chosen"] = backend.fastest_attention([(2, 5)], 4, 16, torch.float32, torch.device("cpu"))
print(json.dumps(found))
"""


def test_the_real_xformers_has_no_kernel_for_a_cpu():
    """It is imported on request, has the stand-in's signature, and torch's kernel is used."""
    folder = package_or_skip("xformers", Path(__file__).with_name("xformers_requirements.txt"))
    environment = {"PYTHONPATH": f"{folder}:{REPOSITORY}", "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITH_THE_REAL_ONE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["available"] and found["file"].startswith(str(folder))
    assert found["parameters"] == list(inspect.signature(memory_efficient_attention).parameters)
    assert found["chosen"][0] == "auto" and "No operator found" in found["chosen"][1]

    backend.xformers_ops.cache_clear()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", backend.BACKENDS)
@pytest.mark.parametrize("sequences, length", [(0, 7), (3, 0)])
def test_nothing_to_attend_from_has_an_empty_result_and_gradients(name, sequences, length, autocast):
    """This occurs for an empty drop-path subset; some kernels return None."""
    q = torch.zeros(sequences, 2, length, 16, requires_grad=True)
    k, v = (torch.zeros(sequences, 2, 7, 16, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = backend.attention(q, k, v, backend=name)
    assert out.shape == q.shape and out.dtype == (torch.bfloat16 if autocast else torch.float32)
    out.sum().backward()
    assert all(one.grad is not None and not one.grad.any() for one in (q, k, v))
