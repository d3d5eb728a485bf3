"""Metrics of a training run: the same numbers in every sink, across a stop and a resume, without affecting
the training."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_custom.logging import remove_logging, sinks
from dinov2_custom.train import get_args_parser, main
from dinov2_custom.utils.weights import read_weights
from tests.logging.wandb_file import read_offline_run
from tests.train.batches import TINY
from tests.train.test_train import rows

RUN = (*TINY, "train.num_workers=0", "train.OFFICIAL_EPOCH_LENGTH=4", "optim.epochs=2", "optim.warmup_epochs=0.5")
SEEN = ("wandb.mode=offline", "wandb.tags=[a,b]", "train.tensorboard=true", "train.log_every=1")
NOT_NUMBERS_OF_TRAINING = {"iter_time", "data_time", "images_per_s", "data_wait", "memory_mib"}


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(12):
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{index}.png")
    yield tmp_path / "images"
    remove_logging("dinov2")


def train(images, out, *arguments) -> int:
    opts = [f"train.dataset_path={images}", *RUN, "--output-dir", str(out), *arguments]
    return main(get_args_parser().parse_args(opts))


def test_rows_have_gradient_norms_and_rates(images, tmp_path):
    assert train(images, tmp_path / "out", "ibot.separate_head=true") == 0
    for row in rows(tmp_path / "out"):
        assert all(row[f"grad_norm_{part}"] > 0 for part in ("backbone", "dino_head", "ibot_head"))
        assert row["images_per_s"] == pytest.approx(4 / row["iter_time"]) and 0 < row["data_wait"] < 1
        assert row["memory_mib"] > 50


@pytest.mark.filterwarnings("default")
def test_every_sink_through_a_stop_and_a_resume(images, tmp_path, monkeypatch):
    for package in ("wandb", "tensorboard"):
        pytest.importorskip(package, reason=f"NO TEST OF ALL SINKS: run pip install {package}")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    write = sinks.JsonLines.log

    def write_and_stop(self, step, row):
        write(self, step, row)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "seen"
    monkeypatch.setattr(sinks.JsonLines, "log", write_and_stop)
    assert train(images, out, *SEEN) == 128 + signal.SIGTERM
    monkeypatch.setattr(sinks.JsonLines, "log", write)
    state = read_weights(out / (out / "last_checkpoint").read_text())
    (out / "logs" / "wandb_run_id").unlink()  # the checkpoint also has it
    assert train(images, out, *SEEN) == 0
    assert train(images, tmp_path / "unseen", "train.log_every=1") == 0

    weights = [read_weights(one / "model_final")["model"] for one in (out, tmp_path / "unseen")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    stopped, resumed = (read_offline_run(f) for f in sorted(out.glob("logs/wandb/offline-run-*/run-*.wandb")))
    assert stopped.id == resumed.id == state["wandb_run_id"]
    assert (stopped.exit_code, resumed.exit_code, stopped.tags) == (143, 0, ["a", "b"])
    seen = [*stopped.history, *resumed.history]
    steps = list(range(8))  # with the row of the step after which it was stopped
    assert [row["_step"] for row in seen] == [row["iteration"] for row in rows(out)] == steps
    for row, other in zip(rows(out), seen, strict=True):
        assert {key: other[key] for key in row} == row
    assert stopped.config["student"]["arch"] == "vit_nano"
    assert stopped.summary["verdict"] == resumed.summary["verdict"] == "none"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "logs" / "tensorboard"))
    events.Reload()
    for key in ("total_loss", "grad_norm_backbone", "images_per_s"):
        scalars = events.Scalars(key)
        assert [e.step for e in scalars] == steps
        assert [e.value for e in scalars] == pytest.approx([row[key] for row in rows(out)], rel=1e-6)
