"""Schedules and parameter groups: every value equals upstream's."""

from __future__ import annotations

import numpy as np
import pytest

from dinov2_custom.train import train as our_train
from tests.oracle import OracleTrainer, oracle_config
from tests.parity.cases import P14, SEPARATE, SWIGLU
from tests.parity.pair import OurTrainer, our_config

RUNS = {
    "short": "train.OFFICIAL_EPOCH_LENGTH=10 optim.epochs=20 optim.warmup_epochs=3",
    "other rates": "optim.base_lr=2e-4 optim.min_lr=1e-5 optim.epochs=50 optim.warmup_epochs=20 "
    "train.OFFICIAL_EPOCH_LENGTH=7 train.batch_size_per_gpu=12 optim.weight_decay_end=0.2 "
    "teacher.momentum_teacher=0.994",
    "frozen last layer": "optim.freeze_last_layer_epochs=4 optim.epochs=5 optim.warmup_epochs=0 "
    "train.OFFICIAL_EPOCH_LENGTH=3 teacher.warmup_teacher_temp_epochs=9",
}
GROUPS = {
    "flat": f"{P14} optim.layerwise_decay=0.9",
    "chunks": f"{P14} optim.layerwise_decay=0.9 student.block_chunks=4",
    "no decay": f"{P14} optim.layerwise_decay=1.0 optim.patch_embed_lr_mult=0.5",
    "separate heads, swiglu": f"{P14} {SEPARATE} {SWIGLU} optim.layerwise_decay=0.75",
}


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_schedules(oracle, overrides, tmp_path):
    expected = oracle.train.build_schedulers(oracle_config(oracle, overrides.split()))
    got = our_train.build_schedulers(our_config(overrides.split(), str(tmp_path)))
    assert len(got) == len(expected) == 5
    for ours, theirs in zip(got, expected, strict=True):
        total = len(theirs.schedule)
        iterations = [*range(total), total, total + 1000]
        np.testing.assert_allclose([ours[i] for i in iterations], [theirs[i] for i in iterations], rtol=1e-12, atol=0)


@pytest.mark.parametrize("overrides", GROUPS.values(), ids=GROUPS)
def test_parameter_groups(oracle, overrides, tmp_path):
    small = "student.arch=vit_small dino.head_n_prototypes=64 ibot.head_n_prototypes=64"
    dotlist = f"{small} {overrides}".split()
    theirs, ours = OracleTrainer(oracle, dotlist), OurTrainer(dotlist, str(tmp_path))
    assert _multipliers(ours) == _multipliers(theirs)


def _multipliers(trainer) -> dict[str, tuple[float, float, bool]]:
    """Return name -> (lr multiplier, weight-decay multiplier, is last layer), of every trained parameter."""
    names = {id(param): name for name, param in trainer.model.student.named_parameters()}
    found = {}
    for group in trainer.model.get_params_groups():
        for param in group["params"]:
            name = names[id(param)]
            assert name not in found, f"{name} is in two groups"
            found[name] = (group["lr_multiplier"], group["wd_multiplier"], group["is_last_layer"])
    assert set(found) == set(names.values())
    return found


def test_layerwise_decay_of_a_small_model(tmp_path):
    """Compare with figures from upstream's later revision: ViT-S, decay .9."""
    overrides = "student.arch=vit_small dino.head_n_prototypes=64 optim.layerwise_decay=0.9".split()
    multipliers = {name: m[0] for name, m in _multipliers(OurTrainer(overrides, str(tmp_path))).items()}
    expected = {
        "backbone.pos_embed": 0.25419,
        "backbone.cls_token": 0.25419,
        "backbone.mask_token": 0.25419,
        "backbone.patch_embed.proj.weight": 0.05084,
        "backbone.blocks.0.attn.qkv.weight": 0.28243,
        "backbone.blocks.11.mlp.fc1.bias": 0.9,
        "backbone.norm.weight": 1.0,
        "dino_head.mlp.0.weight": 1.0,
    }
    assert {name: multipliers[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("base_lr, batch, lr", [(0.004, 2048, 0.00565685), (0.004, 64, 0.001), (2e-4, 3072, 3.4641e-4)])
def test_learning_rate_rule(tmp_path, base_lr, batch, lr):
    cfg = our_config([f"optim.base_lr={base_lr}", f"train.batch_size_per_gpu={batch}"], str(tmp_path))
    assert cfg.optim.lr == pytest.approx(lr, rel=1e-5)
