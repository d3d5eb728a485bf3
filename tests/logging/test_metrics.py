"""Statistics, log lines and JSON rows compared with literals and with upstream's MetricLogger on the same numbers."""

import json
import logging
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from dinov2_custom.logging import MetricLogger, SmoothedValue, smoothed_value
from tests.oracle import OracleUnavailable, ensure_oracle


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_smoothed_value_statistics():
    series = SmoothedValue(window_size=4)
    for number in (9.0, 1.0, 2.0, 4.0, 3.0):
        series.update(number)
    assert series.median == 2.0  # lower median of 1 2 4 3
    assert series.avg == 2.5 and series.max == 4.0 and series.value == 3.0
    assert series.global_avg == pytest.approx(3.8)
    assert str(series) == "2.0000 (3.8000)"


def test_median_is_rounded_to_fp32():
    series = SmoothedValue()
    series.update(2e-4)
    assert series.median == 0.00019999999494757503
    assert series.global_avg == 2e-4


def test_weights_count_in_the_global_average_only():
    series = SmoothedValue()
    series.update(1.0, num=3)
    series.update(torch.tensor(5.0), num=1)
    assert series.global_avg == 2.0 and series.avg == 3.0


def test_empty_series_is_nan():
    series = SmoothedValue()
    assert all(math.isnan(getattr(series, name)) for name in ("median", "avg", "global_avg", "max", "value"))


@pytest.mark.parametrize(
    "value", [1.5, np.float32(1.5), torch.tensor(1.5), torch.tensor([[1.5]]), torch.tensor(1.5).half()]
)
def test_kinds_of_numbers(value):
    series = SmoothedValue()
    series.update(value)
    assert series.value == 1.5


def test_tensors_are_read_only_when_a_line_is_written(monkeypatch, tmp_path):
    reads = []
    read = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (reads.append(tuple(self.shape)), read(self))[1])
    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("read a tensor"))
    logger = MetricLogger(output_file=tmp_path / "rows.json")
    weight = torch.tensor(2.0, requires_grad=True)
    for step in range(7):
        logger.update(loss=weight * step, koleo=0.5 if step % 2 else torch.tensor(float(step)))
    assert reads == []
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (reads.append(tuple(self.shape)), read(self))[1])
    logger.add_meter("sum", SmoothedValue(of=lambda matrix: float(matrix.sum(dim=0)[1])))
    logger.update(sum=torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    logger.dump_in_output_file(6, 0.1, 0.1)
    assert reads == [(17,)]  # all series in one transfer: 7 losses, 4 koleos and a matrix
    assert logger.sum.value == 12.0
    assert list(logger.koleo.deque) == [0.0, 0.5, 2.0, 0.5, 4.0, 0.5, 6.0]
    assert logger.loss.global_avg == 6.0


def test_tensors_of_whole_numbers_and_truth_values_become_numbers():
    series = SmoothedValue()
    for number in (torch.tensor(3), torch.tensor(True)):
        series.update(number)
    assert series.state() == [3.0, 1.0] and {type(number) for number in series.state()} == {float}


def test_window_is_restored_through_json():
    before, after = SmoothedValue(window_size=4), SmoothedValue(window_size=4)
    for number in (9.0, 0.1, math.nan, math.inf, 0.3):
        before.update(torch.tensor(number, dtype=torch.float64))
    after.load_state(json.loads(json.dumps(before.state(), allow_nan=False)))
    for series in (before, after):
        series.update(0.2)
    assert str(after.deque) == str(before.deque) and after.median == before.median == pytest.approx(0.2)


def test_a_series_that_a_resumed_run_no_longer_has_is_in_no_row_but_in_the_next_checkpoint(tmp_path):
    metrics = MetricLogger(output_file=tmp_path / "rows.json", make={"rare": lambda: SmoothedValue(window_size=2)})
    metrics.load_state({"koleo_loss": [3.0], "rare": [1.0, 5.0], "loss": [2.0, 4.0]})
    metrics.update(loss=6.0)
    metrics.dump_in_output_file(0, 0.1, 0.1)
    (row,) = _rows(tmp_path / "rows.json")
    assert row["loss"] == 4.0 and not {"koleo_loss", "rare"} & set(row)
    assert metrics.state() == {"koleo_loss": [3.0], "rare": [1.0, 5.0], "loss": [2.0, 4.0, 6.0]}
    metrics.update(rare=7.0)
    assert metrics.state()["rare"] == [5.0, 7.0]


def test_waiting_tensors_are_bounded():
    series = SmoothedValue()
    for step in range(smoothed_value._MAX_PENDING + 3):
        series.update(torch.tensor(float(step)))
    assert len(series.pending) == 3
    assert series.value == smoothed_value._MAX_PENDING + 2 and series.count == smoothed_value._MAX_PENDING + 3


def test_meter_under_two_names_is_counted_once():
    logger, shared = MetricLogger(), SmoothedValue()
    logger.add_meter("a", shared)
    logger.add_meter("b", shared)
    logger.update(a=torch.tensor(1.0), c=torch.tensor(7.0))
    assert str(logger) == "a: 1.0000 (1.0000)\tb: 1.0000 (1.0000)\tc: 7.0000 (7.0000)"


def test_unknown_series_is_an_attribute_error():
    logger = MetricLogger()
    logger.update(loss=1.0)
    assert logger.loss.value == 1.0
    with pytest.raises(AttributeError, match="no attribute or series 'lr'; series: loss"):
        _ = logger.lr


def _train(logger, start, stop, header="Training", **kwargs):
    """Run a loop in which iteration i reports loss i, and return the iterations executed."""
    done = []
    for iteration in logger.log_every(iter(range(start, 100)), 10, header, stop, start, **kwargs):
        logger.update(lr=2e-4, total_loss=torch.tensor(float(iteration)))
        done.append(iteration)
    return done


def test_rows_every_tenth_and_last_iteration(tmp_path):
    path = tmp_path / "training_metrics.json"
    assert _train(MetricLogger("  ", path), 0, 25) == list(range(25))
    rows = _rows(path)
    assert [row["iteration"] for row in rows] == [0, 10, 20, 24]
    assert list(rows[0]) == ["iteration", "iter_time", "data_time", "lr", "total_loss"]
    assert [row["total_loss"] for row in rows] == [0, 5, 10, 14]  # lower medians of at most 20 numbers
    assert all(row["iter_time"] >= row["data_time"] >= 0 for row in rows)


def test_log_line(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    caplog.set_level(logging.INFO, logger="dinov2")
    _train(MetricLogger("  "), 0, 25, images_per_iteration=64)
    assert re.fullmatch(
        r"Training  \[10/25\]  eta: 0:00:00  lr: 0\.0002 \(0\.0002\)  total_loss: 5\.0000 \(5\.0000\)"
        r"  time: \d\.\d{6}  data: \d\.\d{6}  images/s: \d+\.\d",
        caplog.messages[1],
    )
    assert caplog.messages[0].startswith("Training  [ 0/25]  eta: ")
    assert re.fullmatch(r"Training took 0:00:00 for 25 iterations \(0\.\d{6} s / it\)", caplog.messages[-1])


def test_resumed_loop_counts_from_its_start(tmp_path):
    path = tmp_path / "training_metrics.json"
    assert _train(MetricLogger("  ", path), 15, 22) == list(range(15, 22))
    assert [row["iteration"] for row in _rows(path)] == [20, 21]


@pytest.mark.parametrize("start", [25, 26])
def test_finished_run_does_nothing(tmp_path, start):
    source = iter([1])
    logger = MetricLogger(output_file=tmp_path / "rows.json")
    assert list(logger.log_every(source, 10, "Training", 25, start)) == []
    assert next(source) == 1  # nothing was taken
    assert not (tmp_path / "rows.json").exists()


def test_no_batch_is_taken_beyond_the_last():
    source = iter(range(10))
    assert list(MetricLogger().log_every(source, 10, n_iterations=4)) == [0, 1, 2, 3]
    assert next(source) == 4


def test_length_of_the_iterable_is_the_default():
    assert len(list(MetricLogger().log_every([7] * 5, 2))) == 5
    with pytest.raises(TypeError, match="n_iterations"):
        next(MetricLogger().log_every(iter([1]), 2))


def test_nan_losses_stay_loadable(tmp_path):
    logger = MetricLogger(output_file=tmp_path / "rows.json")
    logger.update(loss=torch.tensor(math.nan), koleo=math.inf)
    logger.dump_in_output_file(0, 0.1, 0.1)
    row = _rows(tmp_path / "rows.json")[0]
    assert math.isnan(row["loss"]) and row["koleo"] == math.inf


ORACLE_SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from dinov2.logging import MetricLogger
logger = MetricLogger(delimiter="  ", output_file=sys.argv[2])
stream = iter(json.loads(sys.argv[3]))
for _ in logger.log_every(range(53), 10, "Training", 53, 0):
    logger.update(**next(stream))
print(str(logger))
"""


def test_rows_equal_upstreams(tmp_path):
    try:
        oracle = ensure_oracle()
    except OracleUnavailable as e:
        pytest.skip(f"NO PARITY CHECK: upstream's package cannot be had: {e}")
    random = np.random.default_rng(0)
    stream = [{"lr": random.random() * 1e-4, "total_loss": random.normal(), "koleo": i / 7} for i in range(53)]
    theirs, ours = tmp_path / "theirs.json", tmp_path / "ours.json"
    command = [sys.executable, "-W", "ignore", "-c", ORACLE_SCRIPT, str(oracle), str(theirs), json.dumps(stream)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=_plain_environment())
    assert done.returncode == 0, done.stderr
    logger, numbers = MetricLogger("  ", ours), iter(stream)
    for _ in logger.log_every(range(53), 10, "Training", 53, 0):
        logger.update(**next(numbers))
    timeless = [{key: value for key, value in row.items() if not key.endswith("_time")} for row in _rows(ours)]
    expected = _rows(theirs)
    assert [list(row) for row in _rows(ours)] == [list(row) for row in expected]
    assert timeless == [{key: value for key, value in row.items() if not key.endswith("_time")} for row in expected]
    assert str(logger) == done.stdout.strip()


def _plain_environment():
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
