import math

import pytest

from dinov2_custom.plots.epochs import (
    iterations_per_epoch,
    iterations_per_pass,
    num_processes,
    seconds_per_iteration,
    warmup_iterations,
)
from dinov2_custom.plots.metrics_file import Run

# 35 iterations a pass
ROWS = [{"iteration": i, "epoch": (i + 1) / 35, "iter_time": 1.0} for i in range(9, 400, 10)]


def run(rows=ROWS, optim=None, **train) -> Run:
    return Run("run", rows, {"train": train, "optim": {"epochs": 100, "warmup_epochs": 10} | (optim or {})})


def test_an_epoch_is_what_the_configuration_counts():
    assert iterations_per_epoch(run(OFFICIAL_EPOCH_LENGTH=100)) == 100
    assert iterations_per_pass(run(OFFICIAL_EPOCH_LENGTH=100)) == pytest.approx(35)
    assert iterations_per_epoch(run(OFFICIAL_EPOCH_LENGTH="auto")) == 35


def test_upstreams_rows_and_a_decoders():
    upstream = [{"iteration": 0, "iter_time": 1.0}]
    assert iterations_per_epoch(run(upstream, OFFICIAL_EPOCH_LENGTH=1250)) == 1250
    assert iterations_per_pass(run(upstream)) is None and iterations_per_epoch(Run("r", upstream, {})) is None
    assert iterations_per_epoch(Run("decoder", ROWS, {})) == pytest.approx(35)
    assert iterations_per_pass(Run("r", [*ROWS, {"iteration": 400, "epoch": math.nan}], {})) == pytest.approx(35)


def test_the_warm_up_is_that_of_training():
    assert warmup_iterations(run(OFFICIAL_EPOCH_LENGTH=100)) == 1000
    assert warmup_iterations(run(OFFICIAL_EPOCH_LENGTH=100, optim={"warmup_epochs": "5%"})) == 500
    assert warmup_iterations(run(OFFICIAL_EPOCH_LENGTH=100, max_steps=400)) == 40
    assert warmup_iterations(run(OFFICIAL_EPOCH_LENGTH=100, max_hours=0.5)) == pytest.approx(180)  # a tenth of 1800 s
    assert warmup_iterations(Run("r", ROWS, {})) == 0


def test_seconds_include_evaluations_but_not_the_start():
    rows = [{"iteration": i, "iter_time": 3.0 if i % 40 == 30 else 1.0} for i in range(0, 200, 10)]
    rows[0]["iter_time"] = rows[1]["iter_time"] = 100.0  # compilation
    assert seconds_per_iteration(run(rows)) == pytest.approx(27 / 17)  # of rows 30 to 190, 5 with an evaluation
    assert seconds_per_iteration(run([{"iteration": 0}])) is None
    assert seconds_per_iteration(run(rows[:1])) == 100


def test_the_number_of_gpus_is_that_of_the_latest_row_that_shows_it():
    shown = {"iteration": 0, "iter_time": 2.0, "current_batch_size": 8.0, "images_per_s": 32.0}
    assert num_processes(run([shown | {"images_per_s": 8.0}, shown, ROWS[0]])) == 8
    assert num_processes(run([shown, shown | {"images_per_s": math.nan}], {"accumulation_steps": 4})) == 2
    assert num_processes(run([shown], {"accumulation_steps": "abc"})) is None
    assert num_processes(run(ROWS)) is None
