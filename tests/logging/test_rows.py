"""The JSON-lines file across kills and resumes."""

import json
import math

import pytest

from dinov2_custom.logging import append_row, truncate_after


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "training_metrics.json"
    for iteration in range(5):
        append_row(path, {"iteration": iteration, "loss": iteration / 2})
    return path


def test_append_keeps_order_and_non_finite_numbers(path):
    append_row(path, {"iteration": 5, "loss": math.nan, "lr": math.inf})
    last = _rows(path)[-1]
    assert list(last) == ["iteration", "loss", "lr"]
    assert math.isnan(last["loss"]) and last["lr"] == math.inf
    assert path.read_bytes().count(b"\n") == 6


def test_truncate_drops_what_a_resumed_run_will_repeat(path):
    assert truncate_after(path, 3) == 2
    assert [row["iteration"] for row in _rows(path)] == [0, 1, 2]
    append_row(path, {"iteration": 3})
    assert [row["iteration"] for row in _rows(path)] == [0, 1, 2, 3]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_truncate_leaves_a_good_file_untouched(path):
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert truncate_after(path, 5) == 0
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


@pytest.mark.parametrize(
    "torn", [b'{"iteration": 4, "lo', b'{"iteration": 4, "loss": 2}', b"\xff\xfe", b"[1]\n", b"{}\n"]
    + [b"[" * 100_000 + b"\n", b'{"iteration": 1, "iteration": 2}\n'],
    ids=range(7),
)
def test_torn_last_line(path, torn):
    path.write_bytes(path.read_bytes() + torn)
    assert truncate_after(path, 5) == 1
    assert len(_rows(path)) == 5


def test_append_after_a_torn_line_starts_a_new_one(path):
    path.write_bytes(path.read_bytes() + b'{"iteration": 5, "lo')
    append_row(path, {"iteration": 5})
    assert json.loads(path.read_bytes().splitlines()[-1]) == {"iteration": 5}
    assert truncate_after(path, 6) == 1
    assert len(_rows(path)) == 6


def test_missing_file_stays_missing(tmp_path):
    assert truncate_after(tmp_path / "none.json", 0) == 0
    assert not list(tmp_path.iterdir())
