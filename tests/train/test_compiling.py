import logging

import pytest
import torch

from dinov2_custom.layers import Block
from dinov2_custom.train import compiling
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import random_batch, tiny_config


def step(model, cfg):
    losses = model.forward_backward(random_batch(cfg), 0.05, torch.Generator().manual_seed(0))
    return losses, [p.grad for p in model.student.parameters()]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
def test_no_graph_breaks_and_the_same_numbers_for_any_number_of_tokens():
    """``fullgraph`` makes a graph break an error."""
    plain, compiled = (Block(16, num_heads=2, init_values=0.5, qkv_bias=True).train() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiling.compile_block(compiled, "aot_eager")
    for num_sequences in (3, 4):
        x = torch.randn(num_sequences, 5, 16, generator=torch.Generator().manual_seed(0))
        outputs = [block([x])[0] for block in (plain, compiled)]
        for block, out in zip((plain, compiled), outputs, strict=True):
            block.zero_grad()
            out.square().sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0])
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5)


def test_the_step_uses_what_was_compiled(monkeypatch):
    """With a compiler that only counts calls: every branch and every chunk goes through it, and nothing changes."""
    calls = []

    def counting(function, **options):
        def run(*args):
            calls.append(getattr(function, "__name__", "?"))
            return function(*args)

        return run

    cfg = tiny_config("train.lean=false", "student.drop_path_rate=0.3")
    plain, compiled = SSLMetaArch(cfg).train(), SSLMetaArch(tiny_config("student.drop_path_rate=0.3")).train()
    monkeypatch.setattr(torch, "compile", counting)
    assert compiling.compile_step(compiled)
    (losses, gradients), (other_losses, other_gradients) = step(plain, cfg), step(compiled, cfg)
    assert {"attention_residual", "ffn_residual", "chunk_cross_entropy"} <= set(calls)
    for name, value in losses.items():
        torch.testing.assert_close(other_losses[name], value, rtol=1e-5, atol=1e-6)
    for value, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)


def test_without_a_compiler_one_warning(caplog, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(compiling, "_probe", broken)
    cfg = tiny_config()
    model = SSLMetaArch(cfg).train()
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        assert not compiling.compile_step(model)
    warned = [record.message for record in caplog.records if "train.compile" in record.message]
    assert len(warned) == 1 and "No working C++ compiler found" in warned[0]
    step(model, cfg)


def test_auto_is_off():
    assert [compiling.is_wanted(setting) for setting in ("auto", "on", "off")] == [False, True, False]
