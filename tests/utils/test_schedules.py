"""CosineScheduler: upstream's figures, and upstream's own class on a grid of lengths."""

import numpy as np
import pytest

from dinov2_custom.utils.schedules import CosineScheduler
from tests.utils.oracle_file import load_oracle_file


def test_figures_of_upstream():
    schedule = CosineScheduler(1.0, 0.0, total_iters=10, warmup_iters=4)
    expected = [0, 0.333333, 0.666667, 1, 1, 0.933013, 0.75, 0.5, 0.25, 0.066987]
    assert [schedule[i] for i in range(10)] == pytest.approx(expected, abs=1e-6)
    assert schedule[10] == schedule[10**9] == 0.0
    assert len(schedule) == 10


def test_teacher_temperature_warms_up_and_stays():
    schedule = CosineScheduler(0.07, 0.07, total_iters=4, warmup_iters=4, start_warmup_value=0.04)
    assert [schedule[i] for i in range(6)] == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07], abs=1e-12)


def test_freeze_comes_first():
    schedule = CosineScheduler(2.0, 1.0, total_iters=6, warmup_iters=2, start_warmup_value=1.0, freeze_iters=2)
    assert [schedule[i] for i in range(7)] == pytest.approx([0, 0, 1, 2, 2, 1.5, 1])


def test_part_of_a_schedule_can_be_set():
    schedule = CosineScheduler(1.0, 0.0, total_iters=10)
    schedule.schedule[:3] = 0
    assert [schedule[i] for i in range(3)] == [0, 0, 0] and schedule[3] > 0


@pytest.mark.parametrize("total, warmup, freeze", [(10, 11, 0), (10, 6, 5), (-1, 0, 0), (10, -1, 0), (10, 0, -2)])
def test_impossible_lengths(total, warmup, freeze):
    with pytest.raises(ValueError, match="shorten the warm-up or train longer"):
        CosineScheduler(1.0, 0.0, total, warmup, freeze_iters=freeze)


def test_counts_are_whole_numbers():
    with pytest.raises(TypeError):
        CosineScheduler(1.0, 0.0, total_iters=10.5)
    assert len(CosineScheduler(1.0, 0.0, total_iters=np.int64(10))) == 10


def test_negative_iterations_are_refused():
    with pytest.raises(IndexError, match="expected an iteration >= 0, got -1"):
        CosineScheduler(1.0, 0.0, total_iters=10)[-1]


def test_empty_schedule_is_its_final_value():
    assert CosineScheduler(1.0, 0.5, total_iters=0)[0] == 0.5


@pytest.mark.parametrize("total", [1, 2, 7, 1250])
@pytest.mark.parametrize("warmup, freeze", [(0, 0), (0.3, 0.2), (1, 0)])
def test_equals_upstream_bit_for_bit(total, warmup, freeze):
    theirs = load_oracle_file("utils/utils.py").CosineScheduler
    lengths = {"warmup_iters": int(warmup * total), "freeze_iters": int(freeze * total)}
    arguments = dict(base_value=4e-3, final_value=1e-6, total_iters=total, start_warmup_value=1e-5, **lengths)
    ours, expected = CosineScheduler(**arguments), theirs(**arguments)
    assert [ours[i] for i in range(total + 2)] == [expected[i] for i in range(total + 2)]
