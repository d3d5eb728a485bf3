import json

from dinov2_custom.train.health import BadImageLog, CollapseAlarm


def entropies(teacher, prototype):
    return {"teacher_entropy": teacher, "prototype_entropy": prototype}


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
        file.write('[]\n{"path": []}\n{"path": "torn')  # by others, and torn
    again = BadImageLog(path)
    again("a.png", "truncated")
    again("b.png", "empty")
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"path": "a.png", "reason": "truncated"}
    assert json.loads(lines[-1]) == {"path": "b.png", "reason": "empty"}
    assert len(lines) == 5 and again.seen == {"a.png", "b.png"}
