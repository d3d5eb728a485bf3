"""Faster paths do not change the step's numbers, and are bypassed for modified modules."""

import logging
from dataclasses import fields

import pytest
import torch

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.layers import Block, SwiGLUFFNFused
from dinov2_custom.layers.pieces import EAGER, Pieces
from dinov2_custom.train import fast_paths
from dinov2_custom.train.memory import measure_step
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.layers.both_ways import run
from tests.layers.test_backend import memory_efficient_attention, xformers_with
from tests.layers.test_lean import kept_bytes
from tests.processes import launch
from tests.test_parallel import facts_of_two
from tests.train.batches import TINY, random_batch, tiny_config


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
    """Run what inductor would compile, forward and backward, operator by operator; a graph break is an error."""
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)


def block(lean, compiled, **options):
    """Return a block and the function that runs it."""
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


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler reads it
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
    """By the count, intermediates of a compiled piece are never in memory."""
    cfg = tiny_config("student.arch=vit_micro", "train.batch_size_per_gpu=16", "student.drop_path_rate=0.3")
    plain = measure_step(SSLMetaArch, cfg, checkpointing)
    compiled = measure_step(SSLMetaArch, cfg, checkpointing, compiler=lambda function: function)
    assert compiled.categories["activations"] <= plain.categories["activations"]
    assert compiled.peak <= plain.peak


@pytest.mark.parametrize("lean", [True, False])
def test_the_step_uses_what_was_compiled(lean, monkeypatch):
    """With a compiler that only counts calls, every piece or branch and every chunk goes through it, and no result
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
    calls.clear()  # from the trial compilation
    (losses, gradients), (other_losses, other_gradients) = step(plain, cfg), step(compiled, cfg)
    pieces = {field.name for field in fields(Pieces)} - {"gated", "gated_backward", "cast_norm"} | {
        "fused_cross_entropy"
    }
    assert set(calls) == (pieces if lean else {"attn_residual", "ffn_residual"})
    for name, value in losses.items():
        torch.testing.assert_close(other_losses[name], value, rtol=1e-5, atol=1e-6)
    for value, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)


def test_modified_modules_are_called():
    """Change the module before or after it was compiled."""
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
    assert [fast_paths.should_compile(setting) for setting in ("auto", "on", "off")] == [False, True, False]


CHOOSE = """
import os
from dinov2_custom import distributed
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.train import fast_paths
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

distributed.enable(overwrite=True)
rank = distributed.get_global_rank()
fast_paths.fastest_attention = lambda *_: (["xformers", "sdpa"][rank], f"measured by {rank}")
model = SSLMetaArch(load_run_config("", OPTIONS, "unused", require_dataset=False, warn=print))
line = fast_paths.choose_attention(model)
found = {block.attn.backend for part in (model.student, model.teacher) for block in part["backbone"].all_blocks()}
os.write(1, f"rank {rank}: {line}, {found}\\n".encode())  # at once: the processes share it
distributed.disable()
"""


def test_all_processes_take_what_the_first_measured(tmp_path):
    (tmp_path / "run.py").write_text(f"OPTIONS = {list(TINY)}\n{CHOOSE}")
    done = launch(2, str(tmp_path / "run.py"))
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert lines == [f"rank {rank}: measured by 0, {{'xformers'}}" for rank in (0, 1)], done.stderr


@pytest.mark.parametrize("compile", ["on", "off"])
def test_attention_is_timed_with_the_shapes_of_the_run(monkeypatch, compile):
    measured = []
    monkeypatch.setattr(fast_paths, "fastest_attention", lambda *a: measured.append(a) or ("sdpa", "line"))
    options = [*TINY, "crops.global_crops_size=32", "crops.local_crops_size=16", "student.patch_size=8"]
    options += ["train.batch_size_per_gpu=3", "crops.local_crops_number=4", "student.num_register_tokens=2"]
    options += [f"train.compile={compile}"]
    model = SSLMetaArch(load_run_config("", options, "unused", require_dataset=False, warn=lambda note: None))
    line = fast_paths.choose_attention(model)
    parts = model.student, model.teacher
    backends = {block.attn.backend for part in parts for block in part["backbone"].all_blocks()}
    if compile == "on":
        assert measured == [] and backends == {"auto"} and line == ""
    else:
        assert [one[0] for one in measured] == [[(6, 1 + 2 + 16), (12, 1 + 2 + 4)]] and backends == {"sdpa"}


def test_a_step_with_xformers_attention(monkeypatch):
    """The kernel is a stand-in with xformers' signature, as xformers has none for CPUs."""
    calls = []

    def kernel(query, key, value, **kwargs):
        calls.append(torch.is_grad_enabled())
        return memory_efficient_attention(query, key, value, **kwargs)

    with xformers_with(kernel):
        cfg, results = tiny_config(), []
        for name in ("sdpa", "xformers"):
            monkeypatch.setattr(fast_paths, "fastest_attention", lambda *_, name=name: (name, "line"))
            model = SSLMetaArch(cfg)
            fast_paths.choose_attention(model)
            losses = model.forward_backward(random_batch(cfg), teacher_temp=0.07)
            gradients = {name: p.grad for name, p in model.student.named_parameters() if p.grad is not None}
            results.append((losses, gradients))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert set(calls) == {False, True}  # teacher and student


SHARDED = """
import json, sys, torch
from dinov2_custom import distributed, parallel
from dinov2_custom.compat import fsdp
from dinov2_custom.layers.block import BlockChunk
from dinov2_custom.train.optimization import accumulate_gradients
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import random_batch, tiny_config
from tests.train.test_fast_paths import looked_at

distributed.enable()
rank = distributed.get_global_rank()
parts = [f"compute_precision.{m}.{p}" for m in ("student", "teacher") for p in ("backbone", "dino_head", "ibot_head")]
strategies = [f"{part}.sharding_strategy=FULL_SHARD" for part in parts]
own = ("student.drop_path_rate=0.3", "ibot.separate_head=true", "train.view_groups=4")
cfg = tiny_config(*own, "train.centering=sinkhorn_knopp", *strategies)  # which has no centre that moves
model = SSLMetaArch(cfg).train()
reducer = parallel.parallelize(cfg, model)

def step(model, reducer):
    model.student.zero_grad(set_to_none=True)
    accumulate_gradients(cfg, model, reducer, random_batch(cfg, seed=rank), iter(()), 0.05,
                         torch.Generator().manual_seed(0))
    return [p.grad.full_tensor().norm().item() for p in model.student.parameters()]

lean = step(model, reducer)
facts = {"class": type(model.student["backbone"].all_blocks()[0]).__name__, "lean": looked_at(model)}
seen = []
first, second, *_ = model.student["backbone"].all_blocks()
handles = [first.register_forward_hook(lambda *_: seen.append("block"))]
handles.append(second.attn.qkv.register_forward_pre_hook(lambda *_: seen.append("qkv")))
handles.append(model.student["dino_head"].register_forward_hook(lambda *_: seen.append("head")))
hooked = step(model, reducer)
facts["hooked"], facts["seen"] = looked_at(model), sorted(set(seen))
for handle in handles:
    handle.remove()
again = step(model, reducer)
facts["again"] = looked_at(model)
facts["same"] = [max(abs(a - b) / (abs(a) + 1e-4) for a, b in zip(lean, other)) for other in (hooked, again)]

cfg = tiny_config("student.block_chunks=2", "student.drop_path_rate=0.3")
own = SSLMetaArch(cfg).train()
alone = SSLMetaArch(cfg).train()
wrap = fsdp.get_fsdp_wrapper(cfg.compute_precision.student.backbone, {BlockChunk})
own.student["backbone"] = wrap(own.student["backbone"])
own.forward_backward(random_batch(cfg, seed=rank), 0.05, torch.Generator().manual_seed(0))
facts["own"] = looked_at(own)
facts["gradients"] = all(p.grad is not None for p in own.student["backbone"].blocks.parameters())
json.dump(facts, open(f"{sys.argv[1]}/{rank}.json", "w"))
distributed.disable()
"""


def looked_at(model):
    """Return how many blocks run from their weights, whether heads do, and the modifications of the others."""
    model.update_shortcuts()
    found = model.shortcuts
    return [len(found.student), len(found.teacher), found.heads, list(found.changes)]


def test_sharded_by_this_package_or_by_the_user(tmp_path):
    for facts in facts_of_two(tmp_path, SHARDED):
        assert facts["class"].startswith("FSDP")
        assert facts["lean"] == facts["again"] == [4, 4, True, []]
        student, teacher, heads, changes = facts["hooked"]
        assert (student, teacher, heads) == (2, 4, False) and facts["seen"] == ["block", "head", "qkv"]
        expected = ("student.backbone.blocks.0", "student.backbone.blocks.1.attn.qkv", "student.dino_head")
        assert all(name in change for name, change in zip(expected, changes, strict=True))
        assert max(facts["same"]) < 1e-3
        student, teacher, heads, changes = facts["own"]
        assert (student, teacher, heads) == (0, 4, True) and len(changes) == 2 and "FSDPBlockChunk" in changes[0]
        assert facts["gradients"]
