"""Training on a real card: short runs from end to end, and what one step has to be."""

import json
import math

import pytest
import torch

from dinov2_custom.data.pool import PinnedRing, Ring
from dinov2_custom.logging import remove_logging
from dinov2_custom.train import get_args_parser, main
from tests.data.pictures import make_folder
from tests.data.ring_builders import Numbers
from tests.gpu import NEEDS_GPU, ON_STAND_IN
from tests.train.batches import random_batch
from tests.train.test_step_guard import Trainer

pytestmark = [*NEEDS_GPU, pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")]
QUICKSTART = ("--config-file", "configs/quickstart.yaml", "train.log_every=1")


@pytest.fixture
def train(tmp_path):
    make_folder(tmp_path / "images", [f"{i}.png" for i in range(64)], 64, 64)

    def run(*options):
        arguments = [*QUICKSTART, f"train.dataset_path={tmp_path / 'images'}", "--output-dir", str(tmp_path / "run")]
        assert main(get_args_parser().parse_args([*arguments, *options])) == 0
        remove_logging("dinov2")
        lines = (tmp_path / "run" / "training_metrics.json").read_text().splitlines()
        return [json.loads(line) for line in lines], (tmp_path / "run" / "logs" / "log.txt").read_text()

    yield run
    remove_logging("dinov2")


def assert_trained(rows, steps):
    assert [row["iteration"] for row in rows] == list(range(steps))
    assert rows[-1]["skipped_steps"] == 0 and all(math.isfinite(row["total_loss"]) for row in rows)


def test_quickstart(train):
    rows, log = train("train.max_steps=20", "train.num_workers=auto")
    assert_trained(rows, 20)
    assert "device: cuda" in log


def test_resume(train):
    train("train.max_steps=3", "train.num_workers=0")
    rows, log = train("train.max_steps=6", "train.num_workers=0")
    assert_trained(rows, 6)
    assert log.count("resumed from=") == 1


def test_more_groups_of_views_than_some_subsets_have_images(train):
    """With stochastic depth some groups drop every image of a block."""
    options = ["train.view_groups=4", "train.batch_size_per_gpu=2", "student.drop_path_rate=0.4"]
    rows, _ = train("train.max_steps=5", "train.num_workers=0", *options)
    assert_trained(rows, 5)


@pytest.mark.skipif(ON_STAND_IN, reason="the stand-in does not run kernels that are compiled at run time")
def test_compiled(train):
    rows, _ = train("train.max_steps=5", "train.num_workers=0", "train.compile=on")
    assert_trained(rows, 5)


BF16 = [
    f"compute_precision.{model}.{part}.mixed_precision.param_dtype=bf16"
    for model in ("student", "teacher")
    for part in ("backbone", "dino_head", "ibot_head")
]


def test_losses_in_bf16_are_those_of_the_cpu_in_float32():
    cpu, gpu = Trainer("student.layerscale=1.0"), Trainer("student.layerscale=1.0", *BF16, device="cuda")
    gpu.model.load_state_dict(cpu.model.state_dict())
    batch = random_batch(cpu.cfg)
    expected, found = cpu.step(0, batch), gpu.step(0, batch)
    for name in ("dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=0.02), name


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_waits_for_nothing():
    trainer = Trainer(*BF16, device="cuda")
    batches = [random_batch(trainer.cfg, seed) for seed in range(3)]
    trainer.step(0, batches[0])  # makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(3, device="cuda").sum().item()
        for iteration in (1, 2):
            trainer.step(iteration, batches[iteration])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_are_built_in_pinned_memory():
    torch.zeros(1, device="cuda")
    for kind, pinned in ((PinnedRing, True), (Ring, False)):
        ring = kind(Numbers(), 1, 0)
        try:
            arrays = ring.next_batch().arrays
            assert torch.from_numpy(arrays["values"]).is_pinned() == pinned
        finally:
            ring.close()
