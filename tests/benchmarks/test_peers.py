"""What benchmarks/peers.py takes from the two products' metrics: seconds of every step."""

import json

import pytest

from benchmarks.peers import our_seconds, their_seconds
from dinov2_custom.logging import MetricLogger


def test_seconds_of_lightly_train_are_batch_and_wait():
    rows = [
        {"lr-AdamW/cls_token": 4.5e-05, "epoch": 0, "step": 0},
        {"train_loss": 18.65, "profiling/batch_time": 12.5, "epoch": 0, "step": 0},
        {"train_loss": 18.09, "profiling/batch_time": 11.25, "profiling/data_time": 0.5, "epoch": 0, "step": 1},
    ]
    assert their_seconds(map(json.dumps, rows)) == [12.5, 11.75]


def test_our_seconds_are_taken_out_of_the_running_mean(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dinov2_custom.logging.metrics.time.perf_counter", lambda: now[0])
    metrics = MetricLogger(output_file=str(tmp_path / "rows.json"))
    for seconds in metrics.log_every([3.0, 1.0, 2.5], 1):
        now[0] += seconds
    assert our_seconds((tmp_path / "rows.json").read_text().splitlines()) == pytest.approx([3.0, 1.0, 2.5], rel=1e-5)
