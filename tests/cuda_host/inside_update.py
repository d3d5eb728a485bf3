"""The update on the stand-in with real values: a skipped step, and fp16 with its loss scale.

Run by ``test_cuda_host.py``.
"""

import pytest
import torch

from tests.cuda_host.compute import Computing
from tests.train.batches import random_batch
from tests.train.test_step_guard import Trainer, guard_of, poisoned, same

FP16 = [
    f"compute_precision.{model}.{part}.mixed_precision.param_dtype=fp16"
    for model in ("student", "teacher")
    for part in ("backbone", "dino_head", "ibot_head")
]


@pytest.fixture(autouse=True)
def computing():
    with Computing():
        yield


@pytest.mark.parametrize("options", [[], ["train.centering=sinkhorn_knopp", "ibot.separate_head=true"]])
def test_a_step_left_out_changes_no_bit(options):
    trainer = Trainer(*options, device="cuda")
    batches = [random_batch(trainer.cfg, seed) for seed in range(3)]
    trainer.step(0, batches[0])
    before = trainer.state()
    assert before[1][0]["step"].tolist() == 1
    trainer.step(1, poisoned(batches[1]))
    assert same(trainer.state(), before)
    trainer.step(2, batches[2])
    assert not same(trainer.state(), before)
    assert trainer.state()[1][0]["step"].tolist() == 2


def test_fp16_lowers_its_scale_until_the_gradients_are_those_of_float32():
    reference, trainer = Trainer(), Trainer(*FP16, device="cuda")
    trainer.model.load_state_dict(reference.model.state_dict())
    trainer.guard = guard_of(scaled=True)
    scaler = trainer.model.fp16_scaler = torch.amp.GradScaler("cuda", init_scale=2.0**20)  # too large
    batch = random_batch(reference.cfg)
    expected, untrained = reference.step(0, batch), trainer.state()[0]
    for iteration in range(20):
        scale, found = scaler.get_scale(), trainer.step(iteration, batch)
        if not same(trainer.state()[0], untrained):
            break
        assert scaler.get_scale() == scale / 2
    assert 0 < iteration < 19
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=0.05, abs=1e-3), name
