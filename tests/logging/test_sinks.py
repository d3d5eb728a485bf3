"""Rows in every sink, read back from the files, also across kills; failing sinks never stop a run."""

import json
import logging
import math
import sys

import pytest

from dinov2_custom import distributed
from dinov2_custom.configs.schema import default_values
from dinov2_custom.files import append_row
from dinov2_custom.logging import MetricLogger, Sinks, open_sinks, truncate_after
from dinov2_custom.logging.sinks import JsonLines


def config(**wandb):
    values = default_values()
    values["wandb"] |= wandb
    return values


class Broken:
    name = "broken"
    retries = False

    def __init__(self):
        self.calls = 0

    def log(self, step, row):
        self.calls += 1
        raise ConnectionResetError("gone")

    def summarize(self, facts):
        raise BrokenPipeError("gone")

    def state(self):
        return {"a": "b"}

    def close(self, exit_code):
        raise OSError("still gone")


def test_only_the_file_by_default(tmp_path):
    with open_sinks(tmp_path, config(), 0) as sinks:
        assert sinks.names == ["training_metrics.json"] and sinks.state() == {}
        sinks.log(3, {"iteration": 3, "loss": 1.5})
        sinks.log(4, {"loss": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["training_metrics.json"]
    lines = (tmp_path / "training_metrics.json").read_text().splitlines()
    assert json.loads(lines[0]) == {"iteration": 3, "loss": 1.5} and lines[1] == '{"iteration": 4, "loss": NaN}'


def test_only_the_first_rank_has_sinks(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    with open_sinks(tmp_path, config(mode="offline"), 0) as sinks:
        assert sinks.names == []
        sinks.log(0, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_broken_sink_is_left_out_with_one_warning(tmp_path, caplog):
    broken, file = Broken(), JsonLines(tmp_path / "rows.json")
    with Sinks([broken, file]) as sinks:
        for step in range(3):
            sinks.log(step, {"loss": 0.0})
        assert sinks.names == ["rows.json"]
    assert broken.calls == 1 and len((tmp_path / "rows.json").read_text().splitlines()) == 3
    assert [r.getMessage() for r in caplog.records] == [
        "broken: cannot write metrics, ConnectionResetError: gone; nothing more is sent there; training continues"
    ]


def test_the_file_is_tried_again_after_a_full_disk(tmp_path, caplog):
    missing = tmp_path / "not_yet"
    with Sinks([JsonLines(missing / "rows.json")]) as sinks:
        sinks.log(0, {"loss": 0.0})
        sinks.log(1, {"loss": 0.0})
        missing.mkdir()
        sinks.log(2, {"loss": 0.0})
    assert (missing / "rows.json").read_text() == '{"iteration": 2, "loss": 0.0}\n'
    assert len(caplog.records) == 1 and "this row is lost; training continues" in caplog.text


def test_the_users_interrupt_is_not_swallowed():
    class Slow(Broken):
        def log(self, step, row):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks([Slow()]).log(0, {})


def test_messages_do_not_hold_the_key(monkeypatch, caplog):
    class Talkative(Broken):
        def log(self, step, row):
            raise ValueError("bad key 0123456789abcdef")

    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    Sinks([Talkative()]).log(0, {})
    assert "0123456789abcdef" not in caplog.text and "<WANDB_API_KEY>" in caplog.text


def test_exit_code_distinguishes_an_error_from_completion():
    codes = []

    class Watching(Broken):
        def close(self, exit_code):
            codes.append(exit_code)

    with Sinks([Watching()]):
        pass
    with pytest.raises(ZeroDivisionError), Sinks([Watching()]):
        raise ZeroDivisionError
    with Sinks([Watching()]) as sinks:
        sinks.close(143)
    assert codes == [0, 1, 143]


def test_rows_of_a_loop_have_rates_after_upstreams_keys(tmp_path):
    with open_sinks(tmp_path, config(), 0) as sinks:
        metrics = MetricLogger(sinks=sinks)
        for _ in metrics.log_every(range(3), 10, images_per_iteration=64):
            metrics.update(lr=0.1)
    row = json.loads((tmp_path / "training_metrics.json").read_text().splitlines()[0])
    assert list(row) == ["iteration", "iter_time", "data_time", "lr", "images_per_s", "data_wait", "memory_mib"]
    assert row["images_per_s"] == pytest.approx(64 / row["iter_time"])
    assert row["data_wait"] == pytest.approx(row["data_time"] / row["iter_time"]) and 0 <= row["data_wait"] <= 1
    assert 20 < row["memory_mib"] < 1e5


def test_missing_tensorboard_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    values = config()
    values["train"]["tensorboard"] = True
    with open_sinks(tmp_path, values, 0) as sinks:
        assert sinks.names == ["training_metrics.json"]
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "pip install 'dinov2_custom[tensorboard]'; training continues without it" in record.getMessage()


@pytest.mark.filterwarnings("default")
def test_tensorboard_reads_back_and_continues_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="NO TENSORBOARD TEST: run pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = config()
    values["train"]["tensorboard"] = True
    with open_sinks(tmp_path, values, 0) as sinks:
        for step in (0, 10, 20, 30):
            sinks.log(step, {"total_loss": step / 7, "data_wait": 0.25})
    with open_sinks(tmp_path, values, 15) as sinks:  # the checkpoint was of iteration 14
        sinks.log(20, {"total_loss": -1.0, "data_wait": 0.25})
        sinks.summarize({"verdict": "uniform"})
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["data_wait", "total_loss"]
    scalars = [(e.step, e.value) for e in events.Scalars("total_loss")]
    assert scalars == [(0, 0.0), (10, pytest.approx(10 / 7)), (20, -1.0)]
    (text,) = events.Tensors("config/text_summary")[:1]
    assert b'"arch": "vit_large"' in text.tensor_proto.string_val[0]
    (text,) = events.Tensors("verdict/text_summary")
    assert text.tensor_proto.string_val[0] == b"uniform"


# the JSON-lines file across kills and resumes


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
    "torn",
    [b'{"iteration": 4, "lo', b'{"iteration": 4, "loss": 2}', b"\xff\xfe", b"[1]\n", b"{}\n"]
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
