"""Skipped steps: they change nothing, all processes skip them, and the host never waits."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_custom.errors import NumericsError
from dinov2_custom.logging import remove_logging
from dinov2_custom.parallel import own_share, parallelize
from dinov2_custom.train import get_args_parser, main
from dinov2_custom.train import train as train_module
from dinov2_custom.train.optimization import (
    accumulate_gradients,
    apply_optim_scheduler,
    build_optimizer,
    clip_gradients,
    step_unless,
)
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.step_guard import MAX_STEPS_SCALED, Flags, StepGuard
from tests.processes import launch_source
from tests.train.batches import TINY, random_batch, tiny_config
from tests.train.test_train import rows, weights, write_images

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD, BAD = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, {"a": torch.tensor(1.0), "b": torch.tensor(math.nan)}
NORM, BAD_NORM = {"grad_norm_backbone": torch.tensor(3.0)}, {"grad_norm_backbone": torch.tensor(math.inf)}


def guard_of(*, scaled=False):
    return StepGuard(3, scaled, lambda: "model_0000004")


def check(guard, iteration, losses, norms=NORM, flags=Flags()):  # noqa: B008
    return float(guard.check(iteration, losses, norms, flags)[1])


def test_a_step_is_left_out_for_a_loss_or_a_gradient():
    guard = guard_of()
    assert [check(guard, 0, GOOD), check(guard, 1, BAD), check(guard, 2, GOOD, BAD_NORM)] == [0.0, 1.0, 1.0]
    guard.drain()
    assert guard.skipped == guard.in_a_row == 2


def test_the_third_in_a_row_ends_the_run_and_names_term_iteration_and_checkpoint():
    guard = guard_of()
    for iteration, losses in enumerate([BAD, BAD, GOOD, BAD, BAD, BAD]):
        check(guard, iteration, losses)
        guard.poll()
    assert (guard.skipped, guard.in_a_row) == (4, 2)  # one step late
    check(guard, 6, GOOD)
    with pytest.raises(NumericsError, match=r"non-finite b in 3 .* iteration=5;.* model_0000004"):
        guard.poll()


def test_a_loss_scaler_may_search_for_its_scale():
    guard = guard_of(scaled=True)
    for iteration in range(MAX_STEPS_SCALED - 1):
        check(guard, iteration, GOOD, BAD_NORM)
    guard.drain()
    check(guard, 99, GOOD, BAD_NORM)
    with pytest.raises(NumericsError, match="gradient of backbone"):
        guard.drain()


def test_alone_a_stop_is_read_at_once():
    guard = guard_of()
    check(guard, 0, GOOD, flags=Flags(15, 2.5))
    assert guard.poll() == (15, 2.5, False)


class Trainer:
    """The training loop's step, without the loop."""

    def __init__(self, *overrides, device="cpu"):
        self.cfg = tiny_config(*overrides)
        self.model = SSLMetaArch(self.cfg).to(device)
        self.model.prepare_for_distributed_training()
        self.reducer = parallelize(self.cfg, self.model)
        self.model.train()
        self.optimizer = build_optimizer(self.cfg, self.model.get_params_groups())
        self.guard = guard_of()

    def step(self, iteration, *batches):
        apply_optim_scheduler(self.optimizer, 1e-2, 0.1, 1e-2)
        self.optimizer.zero_grad(set_to_none=True)
        first, *rest = batches
        losses = accumulate_gradients(self.cfg, self.model, self.reducer, first, iter(rest), 0.04, None)
        norms = clip_gradients(self.cfg, self.model, self.optimizer)
        losses, skip = self.guard.check(iteration, losses, norms)
        step_unless(skip, self.model, self.optimizer, 0.9)
        self.guard.poll()
        return losses | norms

    def state(self):
        for loss in (self.model.dino_loss, self.model.ibot_patch_loss):
            loss.apply_center_update()
        return owned((self.model.state_dict(), self.optimizer.state_dict()["state"]))


def owned(state):
    """Copy nested tensors; of sharded ones, copy this process's part."""
    if isinstance(state, torch.Tensor):
        return own_share(state).detach().clone()
    if isinstance(state, dict):
        return {key: owned(value) for key, value in state.items()}
    return tuple(owned(value) for value in state)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return all(same(a, b) for a, b in zip(one, other, strict=True))


def poisoned(batch, key="collated_local_crops"):
    batch = dict(batch)
    batch[key] = batch[key].clone()
    batch[key].view(-1)[5] = math.nan
    return batch


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("where", ["collated_local_crops", "collated_global_crops", "gradient"])
def test_a_step_left_out_changes_no_bit(centering, where):
    trainer = Trainer(f"train.centering={centering}", "ibot.separate_head=true")
    batches = [random_batch(trainer.cfg, seed) for seed in range(3)]
    trainer.step(0, batches[0])
    before = trainer.state()
    assert before[1][0]["step"] == 1
    if where == "gradient":  # of a finite loss
        parameter = trainer.model.student["backbone"].norm.bias
        hook = parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), math.inf))
        trainer.step(1, batches[1])
        hook.remove()
    else:
        trainer.step(1, poisoned(batches[1], where))
    assert same(trainer.state(), before)
    trainer.step(2, batches[2])
    other = Trainer(f"train.centering={centering}", "ibot.separate_head=true")
    other.step(0, batches[0])
    other.step(2, batches[2])
    assert same(trainer.state(), other.state()) and not same(trainer.state(), before)


def test_one_bad_micro_batch_leaves_the_whole_step_out():
    trainer = Trainer("optim.accumulation_steps=2")
    batches = [random_batch(trainer.cfg, seed) for seed in range(4)]
    trainer.step(0, *batches[:2])
    before = trainer.state()
    trainer.step(1, poisoned(batches[2]), batches[3])
    assert same(trainer.state(), before)


def test_a_loss_scale_is_lowered_by_a_step_left_out():
    fp16 = [
        f"compute_precision.{model}.{part}.mixed_precision.param_dtype=fp16"
        for model in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    ]
    trainer = Trainer(*fp16)
    trainer.model.fp16_scaler.scale(torch.ones(()))  # makes the scale
    scales = [trainer.model.fp16_scaler.get_scale()]
    before = trainer.state()
    trainer.step(0, poisoned(random_batch(trainer.cfg)))
    scales.append(trainer.model.fp16_scaler.get_scale())
    assert scales[1] == scales[0] / 2 and same(trainer.state()[0], before[0])


class Reads(TorchDispatchMode):
    """Count the operators that would make the host wait for a device.

    Integers are ignored: they describe the batch, whose masks are counted on the CPU.
    """

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal") and args[0].is_floating_point():
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_no_step_reads_a_tensor(centering):
    trainer = Trainer(f"train.centering={centering}")
    batches = [random_batch(trainer.cfg, seed) for seed in range(3)]
    with Reads() as reads:
        assert bool(torch.ones(1)) and reads.found == {"_local_scalar_dense": 1}
        for iteration, batch in enumerate(batches):
            trainer.step(iteration, batch)
    assert reads.found == {"_local_scalar_dense": 1}


def poison_iterations(monkeypatch, iterations):
    make = train_module.make_train_loader

    def make_poisoned(*args, **kwargs):
        loader = make(*args, **kwargs)
        batches = loader.batches

        def poisoning(device, first_draw):
            batch_size = loader.builder.batch_size * loader.builder.world_size
            first = first_draw // batch_size
            for iteration, batch in enumerate(batches(device=device, first_draw=first_draw), first):
                yield poisoned(batch) if iteration in iterations else batch

        loader.batches = poisoning
        return loader

    monkeypatch.setattr(train_module, "make_train_loader", make_poisoned)


RUN = (*TINY, "train.num_workers=0", "train.OFFICIAL_EPOCH_LENGTH=12", "optim.epochs=1", "optim.warmup_epochs=0.25")


def run(images, out, *options):
    try:
        arguments = [f"train.dataset_path={images}", *RUN, "--output-dir", str(out), *options]
        return main(get_args_parser().parse_args(arguments))
    finally:
        remove_logging("dinov2")


def test_a_run_skips_and_counts_bad_steps_and_its_rows_stay_readable(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", 12)
    poison_iterations(monkeypatch, {3, 4, 11})
    assert run(images, tmp_path / "out", "train.log_every=1") == 0
    written = rows(tmp_path / "out")
    assert [row["skipped_steps"] for row in written] == [0] * 4 + [1] + [2] * 6 + [3]
    assert all(math.isfinite(value) for row in written for value in row.values())
    log = (tmp_path / "out" / "logs" / "log.txt").read_text()
    assert log.count("step skipped") == 3 and "non-finite dino_local_crops_loss iteration=3" in log
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())


def test_a_run_that_cannot_continue_names_the_checkpoint_to_continue_from(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", 12)
    poison_iterations(monkeypatch, {6, 7})
    with pytest.raises(NumericsError, match=r"iteration=7; .* last good checkpoint, model_0000005"):
        run(images, tmp_path / "out", "train.max_nonfinite_steps=2", "checkpointing.period=3")


def test_two_processes_leave_out_the_same_step(tmp_path):
    source = """
import json, sys, torch
from dinov2_custom import distributed
from dinov2_custom.parallel import whole_tensor
from tests.train.test_step_guard import Trainer, Flags, poisoned, random_batch, same
distributed.enable()
rank = distributed.get_global_rank()
results = []
sharded = [
    f"compute_precision.{model}.{part}.sharding_strategy=FULL_SHARD"
    for model in ("student", "teacher")
    for part in ("backbone", "dino_head")
]
for options in (["train.centering=centering"], ["train.centering=sinkhorn_knopp"], sharded):
    trainer = Trainer(*options)
    batches = [random_batch(trainer.cfg, 10 * seed + rank) for seed in range(3)]
    trainer.step(0, batches[0])
    before = trainer.state()
    losses = trainer.step(1, poisoned(batches[1]) if rank == 1 else batches[1])
    unchanged = same(trainer.state(), before)
    trainer.step(2, batches[2])
    trainer.guard.drain()
    results.append([unchanged, trainer.guard.skipped, not same(trainer.state(), before)])
    weights = whole_tensor(trainer.model.student["backbone"].pos_embed.detach()).clone()
    results[-1].append(torch.equal(distributed.all_reduce(weights.clone()) / 2, weights))
one = {"a": torch.ones(())}
trainer.guard.check(3, one, one, Flags(12, 7.0) if rank == 1 else Flags(0, 4.5, True))
flags = [trainer.guard.poll()]
trainer.guard.check(4, one, one)
flags.append(trainer.guard.poll())
json.dump([results, flags], open(f"{sys.argv[1]}{rank}", "w"))
distributed.disable()
"""
    launch_source(tmp_path, source, str(tmp_path / "rank"))
    for rank in (0, 1):
        results, flags = json.loads((tmp_path / f"rank{rank}").read_text())
        assert results == [[True, 1, True, True]] * 3
        assert flags == [[0, 0.0, False], [12, 4.5, True]]  # agreed on, one step late; the main process's clock
