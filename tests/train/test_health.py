import json

import pytest
import torch

from dinov2_custom.errors import NumericsError
from dinov2_custom.train.health import BadImageLog, CollapseAlarm, StepGuard, all_finite

GOOD, BAD = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, {"a": torch.tensor(1.0), "b": torch.tensor(float("nan"))}


def test_finiteness():
    assert all_finite(GOOD) and not all_finite(BAD)
    assert not all_finite({"a": torch.tensor(float("inf"))})


def test_guard_gives_up_at_the_third_bad_step_in_a_row_and_names_the_term():
    guard = StepGuard(scaled=False)
    steps = [(False, BAD), (False, BAD), (True, GOOD), (False, BAD), (False, BAD)]
    for iteration, (finite, losses) in enumerate(steps):
        guard.check(finite, losses, iteration)
    assert guard.skipped == 4
    with pytest.raises(NumericsError, match="non-finite b in 3 steps running, the last iteration=5"):
        guard.check(False, BAD, 5)


def test_guard_lets_a_loss_scaler_find_its_scale():
    guard = StepGuard(scaled=True)
    for iteration in range(20):
        guard.check(False, GOOD, iteration)
    with pytest.raises(NumericsError, match="a gradient"):
        for iteration in range(20, 60):
            guard.check(False, GOOD, iteration)


def entropies(teacher, prototype):
    return {"teacher_entropy": torch.tensor(teacher), "prototype_entropy": torch.tensor(prototype)}


def test_alarm_waits_then_warns_once_of_each_kind():
    alarm = CollapseAlarm(num_prototypes=100, patience=3)
    uniform, single, healthy = entropies(4.6, 4.6), entropies(0.0, 0.0), entropies(2.0, 4.0)
    assert [alarm.check(uniform, i) for i in range(5)] == [None, None, "uniform", None, None]
    assert alarm.check(healthy, 5) is None
    assert [alarm.check(single, i) for i in range(3)] == [None, None, "single"]
    assert alarm.check({}, 9) is None


def test_bad_images_are_logged_once_also_after_a_restart(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    log = BadImageLog(path)
    log("a.png", "truncated")
    log("a.png", "truncated")
    with open(path, "a") as file:
        file.write('{"path": "torn')
    again = BadImageLog(path)
    again("a.png", "truncated")
    again("b.png", "empty")
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"path": "a.png", "reason": "truncated"}
    assert json.loads(lines[-1]) == {"path": "b.png", "reason": "empty"}
    assert len(lines) == 3 and again.seen == {"a.png", "b.png"}
