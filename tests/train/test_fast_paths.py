import logging
from dataclasses import fields

import pytest
import torch

from dinov2_custom.layers import Block, SwiGLUFFNFused
from dinov2_custom.layers.pieces import EAGER, Pieces
from dinov2_custom.train import fast_paths
from dinov2_custom.train.memory import measure_step
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.layers.both_ways import run
from tests.layers.test_lean import kept_bytes
from tests.train.batches import random_batch, tiny_config


def step(model, cfg):
    losses = model.forward_backward(random_batch(cfg), 0.05, torch.Generator().manual_seed(0))
    return losses, [p.grad for p in model.student.parameters()]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def aot_eager(function):
    """What inductor would compile, forward and backward, run operator by operator. A graph break is an error."""
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)


def block(lean, compiled, **options):
    """Return a block, and what runs it."""
    torch.manual_seed(0)
    made = Block(32, num_heads=2, init_values=0.5, qkv_bias=True, drop_path=0.4, **options).train()
    if compiled and not lean:
        fast_paths.compile_block(made, aot_eager)
    return made, {"lean": lean, "pieces": fast_paths.compile_pieces(aot_eager) if compiled and lean else EAGER}


def results(made, options, num_sequences, dtype):
    crops = [torch.randn(n, 5, 32, generator=torch.Generator().manual_seed(n)) for n in num_sequences]
    made.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs = run(made, crops, generator=torch.Generator().manual_seed(1), **options)
    sum(out.square().sum() for out in outputs).backward()
    return [*outputs, *(p.grad for p in made.parameters())]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{"lean": True}, {"lean": True, "ffn_layer": SwiGLUFFNFused}, {"lean": False}], ids=str
)
def test_the_same_numbers_for_any_number_of_tokens_compiled_once(dtype, options):
    plain, compiled = (block(compiled=one, **options) for one in (False, True))
    for num_sequences in ((4,), (9, 7), (6,), (5, 11), (17,)):
        expected, got = (results(*made, num_sequences, dtype) for made in (plain, compiled))
        for one, other in zip(got, expected, strict=True):
            tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
            torch.testing.assert_close(one, other, **tolerance)
        if num_sequences == (9, 7):
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("options", [{}, {"ffn_layer": SwiGLUFFNFused}], ids=str)
def test_compiled_pieces_keep_what_lean_blocks_keep(options):
    x = torch.randn(64, 16, 32)
    kept = [kept_bytes(made, x, **how) for made, how in (block(True, one, **options) for one in (True, False))]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_a_step_needs_no_more_memory(checkpointing):
    """By the count: what is made inside a compiled piece is never in memory."""
    cfg = tiny_config("student.arch=vit_micro", "train.batch_size_per_gpu=16", "student.drop_path_rate=0.3")
    plain, compiled = (measure_step(cfg, checkpointing, compiler=one) for one in (None, lambda function: function))
    assert compiled.categories["activations"] <= plain.categories["activations"]
    assert compiled.peak <= plain.peak


@pytest.mark.parametrize("lean", [True, False])
def test_the_step_uses_what_was_compiled(lean, monkeypatch):
    """With a compiler that only counts calls: every piece or branch and every chunk goes through it, and nothing
    changes."""
    calls = []

    def counting(function, **options):
        def run(*args):
            calls.append(getattr(function, "__name__", "?"))
            return function(*args)

        return run

    cfg = tiny_config(f"train.lean={str(lean).lower()}", "student.drop_path_rate=0.3")
    plain, compiled = SSLMetaArch(cfg).train(), SSLMetaArch(cfg).train()
    monkeypatch.setattr(torch, "compile", counting)
    assert fast_paths.compile_step(compiled)
    calls.clear()  # of the trial
    (losses, gradients), (other_losses, other_gradients) = step(plain, cfg), step(compiled, cfg)
    pieces = {field.name for field in fields(Pieces)} - {"gated", "gated_backward", "cast_norm"} | {
        "fused_cross_entropy"
    }
    assert set(calls) == (pieces if lean else {"attn_residual", "ffn_residual"})
    for name, value in losses.items():
        torch.testing.assert_close(other_losses[name], value, rtol=1e-5, atol=1e-6)
    for value, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)


def test_what_is_changed_is_called_as_it_is():
    """Changed before, or after it was compiled."""
    cfg = tiny_config("train.lean=false")
    model = SSLMetaArch(cfg).train()
    first, second, *others = model.student["backbone"].all_blocks()
    seen = []
    first.attn.register_forward_hook(lambda *_: seen.append("first"))
    fast_paths.install(model, lambda function: lambda *args: function(*args))
    assert "ffn_residual" not in vars(first) and all("ffn_residual" in vars(block) for block in (second, *others))
    second.mlp.register_forward_hook(lambda *_: seen.append("second"))
    step(model, cfg)
    assert {*seen} == {"first", "second"}
    assert "ffn_residual" not in vars(second) and all("ffn_residual" in vars(block) for block in others)


def test_without_a_compiler_one_warning(caplog, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(fast_paths, "_probe", broken)
    cfg = tiny_config()
    model = SSLMetaArch(cfg).train()
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        assert not fast_paths.compile_step(model)
    warned = [record.message for record in caplog.records if "train.compile" in record.message]
    assert len(warned) == 1 and "No working C++ compiler found" in warned[0]
    step(model, cfg)


def test_auto_is_off():
    assert [fast_paths.is_wanted(setting) for setting in ("auto", "on", "off")] == [False, True, False]
