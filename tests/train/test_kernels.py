"""The attention kernel of a run: on student and teacher, and the same in all processes."""


import pytest
import torch

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.train import kernels
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.layers.test_backend import memory_efficient_attention, xformers_with
from tests.processes import launch
from tests.train.batches import TINY, random_batch, tiny_config

SCRIPT = """
import os
from dinov2_custom import distributed
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.train import kernels
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

distributed.enable(overwrite=True)
rank = distributed.get_global_rank()
kernels.fastest_attention = lambda *_: (["xformers", "sdpa"][rank], f"measured by {rank}")
model = SSLMetaArch(load_run_config("", OPTIONS, "unused", require_dataset=False, warn=print))
line = kernels.choose_attention(model)
found = {block.attn.backend for part in (model.student, model.teacher) for block in part["backbone"].all_blocks()}
os.write(1, f"rank {rank}: {line}, {found}\\n".encode())  # at once: the processes share it
distributed.disable()
"""


def test_all_processes_take_what_the_first_measured(tmp_path):
    (tmp_path / "run.py").write_text(f"OPTIONS = {list(TINY)}\n{SCRIPT}")
    done = launch(2, str(tmp_path / "run.py"))
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert lines == [f"rank {rank}: measured by 0, {{'xformers'}}" for rank in (0, 1)], done.stderr


@pytest.mark.parametrize("compile", ["on", "off"])
def test_what_is_measured_are_the_shapes_of_the_run(monkeypatch, compile):
    measured = []
    monkeypatch.setattr(kernels, "fastest_attention", lambda *a: measured.append(a) or ("sdpa", "line"))
    options = [*TINY, "crops.global_crops_size=32", "crops.local_crops_size=16", "student.patch_size=8"]
    options += ["train.batch_size_per_gpu=3", "crops.local_crops_number=4", "student.num_register_tokens=2"]
    options += [f"train.compile={compile}"]
    model = SSLMetaArch(load_run_config("", options, "unused", require_dataset=False, warn=lambda note: None))
    line = kernels.choose_attention(model)
    parts = model.student, model.teacher
    backends = {block.attn.backend for part in parts for block in part["backbone"].all_blocks()}
    if compile == "on":
        assert measured == [] and backends == {"auto"} and line == ""
    else:
        assert [one[0] for one in measured] == [[(6, 1 + 2 + 16), (12, 1 + 2 + 4)]] and backends == {"sdpa"}


def test_a_step_with_xformers_attention(monkeypatch):
    """The kernel is a stand-in with xformers' signature; the real one has none for CPUs."""
    calls = []

    def kernel(query, key, value, **kwargs):
        calls.append(torch.is_grad_enabled())
        return memory_efficient_attention(query, key, value, **kwargs)

    with xformers_with(kernel):
        cfg, results = tiny_config(), []
        for name in ("sdpa", "xformers"):
            monkeypatch.setattr(kernels, "fastest_attention", lambda *_, name=name: (name, "line"))
            model = SSLMetaArch(cfg)
            kernels.choose_attention(model)
            losses = model.forward_backward(random_batch(cfg), teacher_temp=0.07)
            gradients = {name: p.grad for name, p in model.student.named_parameters() if p.grad is not None}
            results.append((losses, gradients))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert set(calls) == {False, True}  # teacher and student
