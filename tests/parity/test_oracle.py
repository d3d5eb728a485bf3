"""The oracle itself: it trains, its first losses match upstream's logs, and it leaves no trace."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.oracle import OracleTrainer, ensure_oracle, load_oracle, make_batch
from tests.oracle.loader import NAMES_IN_THE_WAY
from tests.parity.cases import P14

BASE = f"student.arch=vit_small train.batch_size_per_gpu=3 dino.head_hidden_dim=256 {P14}".split()
FEW = ["dino.head_n_prototypes=512"]


@pytest.mark.parametrize("extra", [[], ["train.centering=sinkhorn_knopp", "ibot.separate_head=true"]])
def test_losses_at_the_start_are_those_of_uniform_logits(oracle, extra):
    trainer = OracleTrainer(oracle, BASE + extra, depth=2)
    batch = make_batch(oracle, trainer.cfg, 3, seed=0)
    losses = trainer.forward_backward(batch, teacher_temp=0.07)
    log_k, local = math.log(65536), 8
    assert float(losses["dino_local_crops_loss"]) == pytest.approx(log_k * 2 * local / (2 + 2 * local), rel=0.1)
    assert float(losses["dino_global_crops_loss"]) == pytest.approx(log_k * 2 / (2 + 2 * local), rel=0.1)
    assert float(losses["ibot_loss"]) == pytest.approx(log_k / 4, rel=0.1)


def test_a_train_step_moves_student_and_teacher(oracle):
    trainer = OracleTrainer(oracle, BASE + FEW, depth=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    schedules = oracle.train.build_schedulers(trainer.cfg)
    trainer.train_step(make_batch(oracle, trainer.cfg, 3, seed=0), 2000, schedules)
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    unmoved = {name for name in before if name.startswith(("student.", "teacher."))} - moved
    assert not unmoved


def test_importing_it_leaves_no_trace(oracle, monkeypatch):
    """Our package may be loaded under the same name, or a real xformers: both must be left unchanged."""
    ours = {name: ModuleType(name) for name in ("dinov2", "dinov2.train", "xformers", "xformers.ops")}
    for name, module in ours.items():
        monkeypatch.setitem(sys.modules, name, module)
    before, finders = dict(sys.modules), list(sys.meta_path)
    root = ensure_oracle()
    loaded = load_oracle.__wrapped__(root)
    assert Path(loaded.arch.__file__).is_relative_to(root)
    in_the_way = {name for name in sys.modules if name.split(".")[0] in NAMES_IN_THE_WAY}
    assert in_the_way == {name for name in before if name.split(".")[0] in NAMES_IN_THE_WAY}
    assert all(sys.modules[name] is module for name, module in ours.items())
    assert sys.meta_path == finders


def test_random_state_is_unchanged(oracle):
    states = random.getstate(), torch.get_rng_state()
    trainer = OracleTrainer(oracle, BASE + FEW, depth=1)
    trainer.forward_backward(make_batch(oracle, trainer.cfg, 2, seed=0), teacher_temp=0.07, seed=5)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
