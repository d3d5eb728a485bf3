"""W&B runs, read back from the offline files, and everything that may be missing or broken."""

import contextlib
import logging
import sys

import pytest

from dinov2_custom.configs.schema import default_values
from dinov2_custom.logging import open_sinks, wandb_sink
from tests.logging.wandb_file import read_offline_run

KEY = "0123456789abcdef0123456789abcdef01234567"
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def clean_home(tmp_path, monkeypatch):
    """An environment without user settings, API key or server."""
    wandb = pytest.importorskip("wandb", reason="NO W&B TEST: run pip install wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "home"))
    yield
    with contextlib.suppress(Exception):
        wandb.teardown()


def start(out, first_step=0, stored_run_id=None, **wandb):
    values = default_values()
    values["wandb"] |= {"mode": "offline"} | wandb
    return open_sinks(out, values, first_step, stored_run_id)


def offline_runs(out):
    return [read_offline_run(file) for file in sorted(out.glob("logs/wandb/offline-run-*/run-*.wandb"))]


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "dinov2" and r.levelno >= logging.WARNING]


def test_reads_back_and_a_second_start_continues_with_id_and_steps(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    out = tmp_path / "my_run"
    with start(out, project="cells", group="sweep", tags=["a", 7]) as sinks:
        for step in (0, 10):
            sinks.log(step, {"iteration": step, "total_loss": step / 8, "images_per_s": 64.0})
        state = sinks.state()
    with start(out, 15, project="cells") as sinks:
        sinks.log(20, {"iteration": 20, "total_loss": 2.5})
        sinks.summarize({"verdict": "uniform"})
        sinks.close(143)
    first, second = sorted(offline_runs(out), key=lambda run: run.history[0]["_step"])
    assert (first.project, first.name, first.group, first.tags) == ("cells", "my_run", "sweep", ["a", "7"])
    assert first.id == second.id == state["wandb_run_id"] == (out / "logs" / "wandb_run_id").read_text().strip()
    assert [(row["_step"], row["total_loss"]) for row in first.history] == [(0, 0.0), (10, 1.25)]
    assert [(row["_step"], row["iteration"], row["total_loss"]) for row in second.history] == [(20, 20, 2.5)]
    assert first.history[0]["images_per_s"] == 64.0
    assert first.config["student"]["arch"] == "vit_large" and first.config["wandb"]["project"] == "cells"
    assert (first.exit_code, second.exit_code) == (0, 143)
    assert second.summary["verdict"] == "uniform" and "verdict" not in first.summary
    assert warnings_of(caplog) == []
    assert [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()] == []


def test_whose_id_wins(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "wandb_run_id").write_text("kept1\n")
    run_id = wandb_sink._run_id
    assert run_id("", tmp_path / "kept", "stored1") == "kept1"
    assert run_id("", tmp_path / "new", "stored1") == "stored1"
    assert run_id("", tmp_path / "new", None) == "stored1"  # kept from now on
    assert run_id("given1", tmp_path / "kept", None) == "given1"
    monkeypatch.setenv("WANDB_RUN_ID", "environment1")
    assert run_id("", tmp_path / "kept", None) == "environment1"
    assert run_id("given1", tmp_path / "kept", None) == "given1"
    monkeypatch.delenv("WANDB_RUN_ID")
    ids = {run_id("", tmp_path / str(n), stored) for n, stored in enumerate((None, ""))}
    assert len(ids) == 2 and all(len(one) == 8 for one in ids)


def test_no_key_is_one_warning_and_an_offline_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked the user"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with start(tmp_path, mode="online") as sinks:
        sinks.log(0, {"total_loss": 1.0})
    (warning,) = warnings_of(caplog)
    assert "no API key (set WANDB_API_KEY or run: wandb login); recorded offline" in warning
    assert "wandb sync" in warning
    assert [run.history[0]["total_loss"] for run in offline_runs(tmp_path)] == [1.0]


def test_no_server_is_one_warning_and_an_offline_run_of_the_same_id(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_sink, "INIT_TIMEOUT_S", 2.0)
    with start(tmp_path, mode="online", id="abc123") as sinks:
        sinks.log(7, {"total_loss": 1.0})
    (warning,) = warnings_of(caplog)
    assert "recorded offline, id=abc123" in warning and KEY not in caplog.text
    (run,) = [run for run in offline_runs(tmp_path) if run.history]
    assert run.id == "abc123" and run.history[0]["_step"] == 7
    assert [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()] == []


def test_empty_variables_are_unset_ones(tmp_path, monkeypatch, caplog):
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.setenv(name, "")
    with start(tmp_path / "run") as sinks:
        sinks.log(0, {"iteration": 0, "total_loss": 1.0})
    assert len(offline_runs(tmp_path / "run")) == 1 and warnings_of(caplog) == []


def test_malformed_key_and_id_are_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with start(tmp_path, mode="online", id="a/b:c") as sinks:
        assert sinks.names == ["training_metrics.json"]
    (warning,) = warnings_of(caplog)
    assert warning.endswith("training continues without W&B") and "short" not in warning.replace("too short", "")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_missing_package_is_one_warning(tmp_path, monkeypatch, caplog, mode):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with start(tmp_path, mode=mode) as sinks:
        assert sinks.names == ["training_metrics.json"]
    (warning,) = warnings_of(caplog)
    assert "pip install 'dinov2_custom[wandb]'; training continues without W&B" in warning


@pytest.mark.parametrize(
    ("wanted", "environment", "got"),
    [
        ("online", "", "online"),
        ("online", "offline", "offline"),
        ("online", "dryrun", "offline"),
        ("online", "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("offline", "nonsense", "offline"),
    ],
)
def test_environment_can_only_lower_the_mode(monkeypatch, wanted, environment, got):
    monkeypatch.setenv("WANDB_MODE", environment)
    assert wandb_sink._mode(wanted) == got
