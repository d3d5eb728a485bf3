"""A step never waits for the device, and an evaluation only after its last forward pass: run on ``meta`` tensors, which
stand in for GPU tensors and cannot be read.

Any operation that reads a value (``item``, ``tolist``, ``nonzero``, a mask as an index, ``bool``, a copy to the host)
raises on them. Blocking copies to the device are detected too. Allowed reads are in :data:`ALLOWED`.
torch's fused optimizers, which move the teacher too, have no kernel for them and are not run: they take the flag that
skips a step as a tensor.
"""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2_custom import parallel
from dinov2_custom.data.loaders import make_train_loader
from dinov2_custom.eval import neighbours, utils
from dinov2_custom.eval.utils import ModelWithNormalize
from dinov2_custom.logging import MetricLogger
from dinov2_custom.parallel import GradientReducer, parallelize
from dinov2_custom.train import online, step_guard
from dinov2_custom.train.online import OnlineEvaluation
from dinov2_custom.train.optimization import accumulate_gradients, build_optimizer, clip_gradients, step_unless
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.step_guard import StepGuard
from dinov2_custom.utils import transfer
from tests.data.pictures import make_folder
from tests.train.batches import random_batch, tiny_config

# the only copies to the host in a step; they are read one step later
ALLOWED = {
    "StepGuard.check: finite flags and those that processes share": step_guard,
    "GradientReducer.finish: which parameters have gradients in how many processes": parallel,
}


class NoWaiting(TorchDispatchMode):
    """Raise if a copy from the host to the device is not ``non_blocking``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = [leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is torch.ops.aten._to_copy.default and devices == ["cpu"] and result.device.type == "meta":
            assert kwargs.get("non_blocking"), "a copy to the device that the host waits for"
        if func is torch.ops.aten.copy_.default and devices == ["meta", "cpu"] and args[1].ndim:
            assert (args[2:] or (False,))[0], "a copy to the device that the host waits for"
        return result


def test_what_this_test_relies_on():
    """Each of these would synchronise with a GPU, and raises here."""
    x = torch.ones(3, device="meta")
    reads = [x.sum().item, x.tolist, x.nonzero, x.cpu, lambda: x[x > 0], lambda: bool(x.sum() > 0), lambda: float(x[0])]
    for read in reads:
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
    with NoWaiting(), pytest.raises(AssertionError):
        torch.ones(3).to("meta")
    with NoWaiting(), pytest.raises(AssertionError):
        x.copy_(torch.ones(3))
    with NoWaiting():
        torch.ones(3).to("meta", non_blocking=True)


def no_list_of_numbers(make):
    """Wrap ``make``, a torch function that copies numbers to the device synchronously, to raise there."""

    def checked(*args, **kwargs):
        tensor = make(*args, **kwargs)
        assert tensor.device.type == "cpu", "numbers copied to the device, for which the host waits"
        return tensor

    return checked


@pytest.fixture
def as_a_gpu(monkeypatch):
    """Make a step run on ``meta``, which has no autocast, and record what is sent to the host."""
    sent = []
    monkeypatch.setattr(SSLMetaArch, "autocast", lambda *args: nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *args, found_inf, **kwargs: None)
    monkeypatch.setattr(torch.Tensor, "new_tensor", no_list_of_numbers(torch.Tensor.new_tensor))
    monkeypatch.setattr(torch, "tensor", no_list_of_numbers(torch.tensor))

    def to_host(tensor):
        sent.append(tensor)
        return transfer.HostCopy(torch.ones(tensor.shape, dtype=tensor.dtype))

    for module in ALLOWED.values():
        monkeypatch.setattr(module, "to_host", to_host)
    return sent


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize(
    ("lean", "groups", "recompute", "padded"), [("true", 4, "selective", True), ("false", 1, "full", False)]
)
def test_a_whole_step_reads_nothing_from_the_device(as_a_gpu, centering, lean, groups, recompute, padded):
    cfg = tiny_config(
        f"train.centering={centering}", f"train.lean={lean}", f"train.view_groups={groups}", "ibot.separate_head=true",
        f"train.activation_checkpointing={recompute}", "student.drop_path_rate=0.3", "optim.accumulation_steps=2",
    )  # fmt: skip
    model = SSLMetaArch(cfg).to("meta").train()
    model.set_checkpointing(recompute)
    model.constant_shapes = padded
    model.diagnose = True
    optimizer = build_optimizer(cfg, model.get_params_groups())
    guard, reducer = StepGuard(3, False, lambda: "none"), parallelize(cfg, model)
    metrics = MetricLogger()
    iterations = metrics.log_every(itertools.count(1), 10, "Training", n_iterations=100, start_iteration=1)
    with NoWaiting():
        for iteration in itertools.islice(iterations, 3):  # no line is written: the first is at 10
            optimizer.zero_grad(set_to_none=True)
            batches = (random_batch(cfg, seed) for seed in (1, 2))
            generator = torch.Generator().manual_seed(0)
            losses = accumulate_gradients(cfg, model, reducer, next(batches), batches, 0.05, generator)
            norms = clip_gradients(cfg, model, optimizer)
            losses, skip = guard.check(iteration, losses, norms)
            step_unless(skip, model, optimizer, 0.9)
            guard.poll()
            metrics.update(lr=0.1, total_loss=sum(losses.values()), **losses, **norms, **model.diagnostics)
    assert len(as_a_gpu) == 3
    assert {"dino_local_crops_loss", "koleo_loss", "ibot_loss"} <= set(losses)
    assert all(value.device.type == "meta" for value in (*losses.values(), *norms.values(), skip))


class Read(transfer.HostCopy):
    """A copy to the host that records in ``events`` when the host waits for it."""

    events: ClassVar[list[str]] = []

    def wait(self):
        self.events.append("read")
        return self.tensor


@pytest.mark.parametrize(
    ("lean", "centering", "same"), [("true", "centering", False), ("false", "sinkhorn_knopp", True)]
)
def test_an_evaluation_reads_nothing_before_its_last_forward_pass(
    as_a_gpu, tmp_path, monkeypatch, lean, centering, same
):
    """``same``: labelled images are compared with each other, where an image is not its own neighbour."""
    for part, count in (("train", 8), ("val", 4)):
        make_folder(tmp_path / part, [f"class{i % 2}/{i}.png" for i in range(count)], 20, 20)
    train, val = (f"LabelledFolder:root={tmp_path / name}" for name in ("train", "train" if same else "val"))
    cfg = tiny_config(
        f"train.lean={lean}", f"train.centering={centering}", f"train.output_dir={tmp_path}", "train.num_workers=0",
        f"train.dataset_path=ImageFolder:root={tmp_path / 'train'}", "evaluation.online.every=1",
        "evaluation.online.images=3", "train.batch_size_per_gpu=2", f"evaluation.online.knn_train={train}",
        f"evaluation.online.knn_val={val}",
    )  # fmt: skip
    monkeypatch.setattr(Read, "events", [])
    for module in (online, utils, neighbours):
        monkeypatch.setattr(module, "to_host", lambda tensor: Read(torch.ones(tensor.shape, dtype=tensor.dtype)))
    for owner, name in ((SSLMetaArch, "evaluate"), (ModelWithNormalize, "forward")):
        original = getattr(owner, name)
        recording = lambda *args, original=original: (Read.events.append("pass"), original(*args))[1]  # noqa: E731
        monkeypatch.setattr(owner, name, recording)
    monkeypatch.setattr(online, "KNN_BATCH", 3)
    model = SSLMetaArch(cfg).to("meta").train()
    evaluation = OnlineEvaluation(cfg, make_train_loader(cfg, rank=0, world_size=1))
    start = {"features": torch.ones(3, model.embed_dim), "values": {}, "readable": [0, 1, 2], "left_out": []}
    evaluation.start = start
    with NoWaiting():
        row = evaluation.evaluate(model, 0, 0.05, lambda: 0.0)
    # two batches of held-out images, all labelled ones in batches of three; then: are all there, are they readable, do
    # they differ, hits, features, and the other numbers
    passes = 2 + (3 if same else 4)
    assert Read.events == ["pass"] * passes + ["read"] * 6
    assert {"eval_loss", "eval_knn", "eval_rankme", "eval_cosine_to_start"} <= row.keys()


def test_averaging_gradients_reads_nothing_from_the_device(as_a_gpu, monkeypatch):
    """Use the reducer of two processes with a stand-in for the all-reduce."""
    sums = []

    def all_reduce(tensor, async_op):
        sums.append(tensor)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(parallel.distributed, "get_global_size", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", all_reduce)
    used, other, unused = (torch.nn.Parameter(torch.ones(3, device="meta")) for _ in range(3))
    reducer = GradientReducer({"used": used, "other": other, "unused": unused}.items(), bucket_mib=1e-6)
    with NoWaiting():
        for _ in range(2):
            used.grad = other.grad = None
            reducer.arm()
            (used.sum() + other.sum()).backward()
            reducer.finish()
    assert len(sums) == 6 and len(as_a_gpu) == 2
    assert used.grad.device.type == other.grad.device.type == "meta" and unused.grad is None


def test_small_tensors_reach_a_gpu_through_pinned_memory(monkeypatch):
    """Use the real :func:`to_device` and record its CUDA calls."""
    calls = []
    tensor = torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: calls.append((args, kwargs)) or self)
    transfer.to_device(tensor, torch.device("cuda"))
    assert calls == ["pinned", ((torch.device("cuda"),), {"non_blocking": True})]
    calls.clear()
    transfer.to_device(tensor, torch.device("cpu"))
    assert calls == [((torch.device("cpu"),), {"non_blocking": True})]
