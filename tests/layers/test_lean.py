from functools import partial

import pytest
import torch
from torch import nn

from dinov2_custom.layers import Block, MemEffAttention, SwiGLUFFNFused
from dinov2_custom.layers.lean import activation_linear, gated_activation, gelu_activation, norm_linear
from dinov2_custom.layers.pieces import EAGER, gated
from dinov2_custom.layers.unmodified import find_change
from tests.layers.both_ways import run


def block(**options):
    torch.manual_seed(0)
    made = Block(32, num_heads=2, attn_class=MemEffAttention, **{"init_values": 0.5, "qkv_bias": True, **options})
    assert find_change(made) is None
    return made.train()


def results(lean, made, x, **autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", **(autocast or {"enabled": False})):
        out = run(made, [x], lean, torch.Generator().manual_seed(1))[0]
    out.float().square().mean().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in made.named_parameters()}}


OPTIONS = [
    {},
    {"ffn_layer": SwiGLUFFNFused},
    {"act_layer": partial(nn.GELU, approximate="tanh")},
    {"drop_path": 0.4},
    {"init_values": None},
    {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
]


def tokens():
    return torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_block_equals_autograds_own(options):
    expected, got = (results(lean, block(**options), tokens()) for lean in (False, True))
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_crops_of_two_sizes_equal_autograds_own():
    draws = torch.Generator().manual_seed(2)
    crops = [torch.randn(3, 7, 32, generator=draws), torch.randn(4, 5, 32, generator=draws)]
    got = {}
    for lean in (False, True):
        made, leaves = block(), [crop.clone().requires_grad_() for crop in crops]
        sum(out.square().mean() for out in run(made, leaves, lean)).backward()
        got[lean] = [*(leaf.grad for leaf in leaves), *(p.grad for p in made.parameters())]
    for one, other in zip(got[True], got[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_half_precision_is_as_close_to_fp32_as_autograds_own(options, dtype):
    exact = results(False, block(**options), tokens())
    plain, lean = (results(one, block(**options), tokens(), dtype=dtype) for one in (False, True))
    for name, value in exact.items():
        of_plain, of_lean = ((other[name].float() - value).norm() for other in (plain, lean))
        assert of_lean < 2 * of_plain + 3e-3 * value.norm(), name
        assert lean[name].dtype == plain[name].dtype


@pytest.mark.parametrize(
    "activation", [gated_activation(EAGER), gelu_activation("none", EAGER), gelu_activation("tanh", EAGER)]
)
def test_gradcheck(activation):
    torch.manual_seed(0)
    hidden = 3 if activation.forward is gated else 6
    norm, first, second = nn.LayerNorm(4).double(), nn.Linear(4, 6).double(), nn.Linear(hidden, 5).double()
    x, gamma = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    gamma.requires_grad_()
    parameters = [*norm.parameters(), *first.parameters(), *second.parameters()]
    for p in parameters:
        p.data.normal_()
    calls = lambda *_: activation_linear(norm_linear(x, norm, first), activation, second, gamma, 1.5)  # noqa: E731
    assert torch.autograd.gradcheck(calls, (x, gamma, *parameters))


def kept_bytes(made, x, lean, pieces=EAGER):
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        out = run(made, [x], lean, pieces=pieces)  # noqa: F841 - the graph
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}
    return sum(size for key, size in kept.items() if key not in own)


def test_a_lean_block_keeps_half():
    x = torch.randn(64, 16, 32)
    plain, lean = (kept_bytes(block(), x, one) for one in (False, True))
    assert lean < 0.65 * plain
