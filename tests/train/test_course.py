"""Lengths of a run and its parts, in epochs, in steps and by time."""

import itertools
import json
import os
import signal
from functools import partial

import pytest

from dinov2_custom.logging import sinks
from dinov2_custom.train import train
from dinov2_custom.train.course import TICKS, Course, RunLength, in_words, run_length
from dinov2_custom.train.optimization import build_schedulers
from dinov2_custom.utils.weights import read_weights
from tests.processes import launch_source
from tests.train.batches import TINY, tiny_config
from tests.train.test_step_guard import run
from tests.train.test_train import rows, weights, write_images


def length_of(*overrides, num_images=100):
    return run_length(tiny_config("train.OFFICIAL_EPOCH_LENGTH=10", "optim.warmup_epochs=0", *overrides), num_images, 1)


def test_epochs_are_iterations_and_shares_are_of_the_whole():
    length = length_of("optim.epochs=4")
    assert length.total == 40
    assert [length.iterations(x) for x in (0, 0.5, 3, 7, "10%", "2.5%", "100%")] == [0, 5, 30, 70, 4, 1, 40]


def test_max_steps_stretches_lengths_in_epochs():
    length = length_of("optim.epochs=4", "train.max_steps=200")
    assert length.total == 200
    assert [length.iterations(x) for x in (0, 0.5, 3, 7, "10%")] == [0, 25, 150, 350, 20]


def test_the_same_run_given_in_epochs_and_in_steps():
    in_epochs = build_schedulers(tiny_config("train.OFFICIAL_EPOCH_LENGTH=10", "optim.epochs=40"))
    in_steps = build_schedulers(
        tiny_config(
            "train.max_steps=400", "optim.epochs=40", "optim.freeze_last_layer_epochs=2.5%", "optim.warmup_epochs=25%"
        )
    )
    for one, other in zip(in_epochs, in_steps, strict=True):
        assert [one[i] for i in range(401)] == [other[i] for i in range(401)]


def clocked(hours=1.0, state=None, late=0):
    """Return a course whose clock is advanced by ``now``."""
    now = [100.0]
    length = RunLength(10, TICKS, 4, 100, True, hours)
    return Course(length, state, late, clock=lambda: now[0]), now


def drive(course, now, seconds, until=10**6):
    """Take steps until the last one; return their number and the positions."""
    positions, told = [], [0.0] * course.late
    for iteration in range(until):
        last = course.is_last(iteration)
        positions.append(course.position(iteration))
        now[0] += seconds(iteration)
        told.append(course.read_clock())
        course.update(told.pop(0))
        if last:
            break
    return positions


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("seconds", [lambda i: 60.0, lambda i: 300.0 if i == 0 else 30.0, lambda i: 10 + i % 7])
def test_by_the_clock_a_run_ends_before_its_time_is_over_with_schedules_at_their_end(seconds, late):
    course, now = clocked(hours=1.0, late=late)
    positions = drive(course, now, seconds)
    assert positions[0] == 0 and positions == sorted(positions)
    longest = max(seconds(i) for i in range(1, 20))
    assert 3600 - 4 * longest <= now[0] - 100 <= 3600 + longest / 2
    assert positions[-1] > 0.9 * TICKS
    at_end = course.state(ended=True)["course"]
    assert clocked(1.0, at_end)[0].is_finished(99) and not clocked(1.5, at_end)[0].is_finished(99)


def test_a_resumed_run_has_the_remaining_time():
    course, now = clocked(hours=1.0)
    first = drive(course, now, lambda i: 60.0, until=20)
    kept = json.loads(json.dumps(course.state()))["course"]
    resumed, now = clocked(hours=1.0, state=kept)
    now[0] += 0.5
    assert not resumed.is_finished(20)
    second = drive(resumed, now, lambda i: 60.0)
    whole, now = clocked(hours=1.0)
    assert len(first) + len(second) == pytest.approx(len(drive(whole, now, lambda i: 60.0)), abs=1)
    assert second[0] > first[-1]


def test_a_time_shorter_than_a_step_is_one_step():
    course, now = clocked(hours=0.001)
    assert len(drive(course, now, lambda i: 60.0)) <= 2


def test_short_times_are_not_shown_as_hours():
    assert [in_words(s) for s in (0.04, 7.9, 48, 750, 3600, 26100, 7.2e6)] == [
        "0.04 s", "7.9 s", "48 s", "12.5 min", "1 h", "7.25 h", "2000 h",
    ]  # fmt: skip
    course, _ = clocked(hours=8, state={"elapsed_s": 90.0})
    assert course.describe(100).endswith("8 h of training, 1.5 min of it done")


def test_a_run_in_steps_ignores_the_clock():
    course = Course(length_of("train.max_steps=5"))
    assert course.read_clock() == 0.0 and course.state() == {}
    assert [course.is_last(i) for i in range(6)] == [False] * 4 + [True] * 2
    assert [course.is_finished(i) for i in (4, 5)] == [False, True]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 12)


def test_a_run_of_so_many_steps(images, tmp_path, capsys):
    options = ["train.max_steps=6", "optim.epochs=100", "optim.warmup_epochs=50%", "train.log_every=1"]
    assert run(images, tmp_path, *options) == 0
    written = rows(tmp_path)
    assert [row["iteration"] for row in written] == list(range(6))
    assert "0.5 epochs = 6 iterations" in capsys.readouterr().out
    assert run(images, tmp_path, *options) == 0
    assert "raise train.max_steps to continue" in capsys.readouterr().out


def test_a_run_by_the_clock_stops_resumes_and_ends(images, tmp_path, monkeypatch, capsys):
    write, readings = sinks.JsonLines.log, itertools.count()

    def stop_at_5(self, step, row):
        write(self, step, row)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sinks.JsonLines, "log", stop_at_5)
    # read at the start and once per step: every step takes 0.4 s
    monkeypatch.setattr(train, "Course", partial(Course, clock=lambda: 0.4 * next(readings)))
    hours = 8 / 3600
    options = [
        f"train.max_hours={hours}",
        "optim.warmup_epochs=10%",
        "train.log_every=1",
        "teacher.momentum_teacher=0.5",
    ]
    assert run(images, tmp_path, *options) == 143
    state = read_weights(tmp_path / (tmp_path / "last_checkpoint").read_text())
    assert 0 < state["course"]["elapsed_s"] < 8
    assert run(images, tmp_path, *options) == 0
    written = rows(tmp_path)
    assert [row["iteration"] for row in written] == list(range(len(written))) and 18 <= len(written) <= 20
    momenta = [row["mom"] for row in written]  # medians
    assert momenta[0] == 0.5 and momenta[-1] > momenta[5] > 0.5
    log = capsys.readouterr().out
    assert "8 s of training" in log and " s of it done" in log
    assert (tmp_path / "model_final").exists() and run(images, tmp_path, *options) == 0
    assert "raise train.max_hours to continue" in capsys.readouterr().out


# Each process has its own clock, read at the start and once per step: a step takes 0.5 s, or 0.6 s in the second one
CLOCKS = """
import itertools, os
from functools import partial
from dinov2_custom import entry
from dinov2_custom.train import train
readings, step_s = itertools.count(), 0.5 + 0.1 * int(os.environ["RANK"])
train.Course = partial(train.Course, clock=lambda: step_s * next(readings))
entry.leave(entry.run("dinov2_custom.train.train", train.get_args_parser().parse_args()))
"""


def test_two_processes_agree_on_the_clock(images, tmp_path):
    common = [f"train.dataset_path={images}", *TINY, "train.num_workers=0", "train.log_every=1"]
    common += [f"train.max_hours={6 / 3600}", "optim.warmup_epochs=0", "--output-dir", str(tmp_path)]
    done = launch_source(tmp_path, CLOCKS, *common)
    assert "6 s of training" in done.stdout
    lines = {
        name: [line.split("] ", 1)[1] for line in (tmp_path / "logs" / name).read_text().splitlines() if "[" in line]
        for name in ("log.txt", "log.txt.rank1")
    }
    lrs = [
        [field for line in part for field in line.split("  ") if field.startswith("lr: ")] for part in lines.values()
    ]
    assert lrs[0] == lrs[1] and len(set(lrs[0])) > 1
    assert rows(tmp_path)[-1]["iteration"] == len(lrs[0]) - 1 >= 9
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
