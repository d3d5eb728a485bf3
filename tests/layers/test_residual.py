import pytest
import torch

from dinov2_custom.layers import Block, residual
from dinov2_custom.layers.drop_path import Subset
from dinov2_custom.layers.packed import Packed
from dinov2_custom.layers.residual import Owned, add_residual_subset
from dinov2_custom.models.vision_transformer import vit_nano
from tests.layers.both_ways import run
from tests.parity.pair import unsettle

ROWS = Subset(torch.tensor([4, 0, 3]), [(3, 1)], 1.5)


def copied(x, rows, addend, scale, overwrite, pieces):
    return x.index_add(0, rows, (addend if scale is None else addend * scale).to(x.dtype))


def model(uniform):
    options = {"init_values": 1.0, "drop_path_rate": 0.4, "drop_path_uniform": uniform}  # else the first has none
    made = vit_nano(patch_size=14, img_size=28, **options).train()
    torch.manual_seed(0)
    unsettle(made, seed=0)
    return made


def gradients(made, lean, recompute="none", **autocast):
    made.zero_grad()
    packed = Packed(frozenset(made.all_blocks() if lean else ()), recompute)
    draws = torch.Generator().manual_seed(0)
    images = [torch.randn(count, 3, size, size, generator=draws) for count, size in ((4, 28), (3, 14))]
    with torch.autocast("cpu", **(autocast or {"enabled": False})):
        outputs = made(images, is_training=True, draws=made.draw([4, 3], draws), packed=packed)
    sum(out["x_norm_clstoken"].square().sum() + out["x_prenorm"].sum() for out in outputs).backward()
    return [*(out["x_prenorm"].detach() for out in outputs), *(p.grad for p in made.parameters())]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("uniform", [True, False])
def test_overwriting_changes_nothing(uniform, recompute, monkeypatch):
    made = model(uniform)
    got = gradients(made, True, recompute)
    monkeypatch.setattr(residual, "_added", copied)
    for one, other in zip(got, gradients(made, True, recompute), strict=True):
        assert torch.equal(one, other) if one is not None else other is None


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("uniform", [True, False])
def test_called_blocks_give_the_same(uniform, recompute):
    made = model(uniform)
    for one, other in zip(gradients(made, True), gradients(made, False, recompute), strict=True):
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_the_models_stream_is_overwritten_but_in_the_first_and_the_last_branch(monkeypatch):
    calls, added = [], residual._added

    def counting(x, rows, addend, scale, overwrite, pieces):
        calls.append(overwrite)
        return added(x, rows, addend, scale, overwrite, pieces)

    monkeypatch.setattr(residual, "_added", counting)
    gradients(model(uniform=True), True)
    branches = 2 * 4
    assert calls == [False, *[True] * (branches - 1)] * 2  # forward, then backward from the last branch on


@pytest.mark.parametrize("lean", [True, False])
def test_a_blocks_callers_keep_their_tensors(lean):
    """Two results share a gradient, which is also an expanded scalar."""
    block = Block(16, 2, init_values=0.5, drop_path=0.4).train()

    def drawn(x, seed):
        return run(block, [x], lean, torch.Generator().manual_seed(seed))[0]

    x = torch.randn(6, 5, 16)
    leaf = x.clone().requires_grad_()
    first = drawn(leaf, 0)
    kept = first.detach().clone()
    second = drawn(first, 1)
    (first + second).sum().backward()
    assert torch.equal(leaf.detach(), x) and torch.equal(first.detach(), kept)
    expected = torch.autograd.functional.vjp(
        lambda first: first + drawn(first, 1), kept, torch.ones_like(kept)
    )[1]
    of_x = torch.autograd.functional.vjp(lambda x: drawn(x, 0), x, expected)[1]
    torch.testing.assert_close(leaf.grad, of_x)


def test_overwriting_a_saved_tensor_is_an_error():
    leaf = torch.randn(5, 4, requires_grad=True)
    x = leaf * 2
    kept = x.square()  # its backward pass needs x
    out = add_residual_subset(x, lambda x, *_: x * 3, ROWS, Owned(x=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (kept + out).sum().backward()


@pytest.mark.parametrize("scale", [1.5, torch.tensor([[1.0], [2.0], [3.0]])])
def test_gradcheck(scale):
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    branch = lambda x, segments, scale: x.sin() * scale  # noqa: E731
    assert torch.autograd.gradcheck(lambda x: add_residual_subset(x, branch, ROWS._replace(scale=scale)), (x,))
