"""MLflow runs in the file store, read back with MLflow's client, and everything that may be missing or broken."""

import logging
import os
import shutil
import sys

import pytest

from dinov2_custom.configs.schema import default_values
from dinov2_custom.logging import mlflow_sink, open_sinks

UNDERSCORES = str.maketrans("(é)?", "____")
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def clean_environment(tmp_path, monkeypatch):
    """An environment without user settings, restored after the sink's own changes."""
    pytest.importorskip("mlflow", reason="NO MLFLOW TEST: run pip install mlflow-skinny")
    kept = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    for name in kept:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    os.environ |= kept


def start(out, first_step=0, stored=None, **options):
    values = default_values()
    values["mlflow"] |= {"enabled": True} | options
    return open_sinks(out, values, first_step, None, stored)


def client_of(out):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=(out / "logs" / "mlruns").as_uri())


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "dinov2" and r.levelno >= logging.WARNING]


def test_a_resumed_run_continues_with_the_id_of_the_checkpoint(tmp_path, caplog):
    out = tmp_path / "my_run"
    with start(out, experiment="cells") as sinks:
        for step in (0, 10):
            sinks.log(step, {"iteration": step, "total_loss": step / 8, "rankme": float("nan"), "top (k=1) %": 3.0})
        sinks.summarize({"verdict": "none" + " " * 9000})
        run_id = sinks.state()["mlflow_run_id"]
        sinks.close(143)
    client = client_of(out)
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("KILLED", "my_run")
    assert run.data.params["student.arch"] == "vit_large" and "iteration" not in run.data.metrics
    assert run.data.metrics["top _k_1_ _"] == 3.0 and run.data.tags["verdict"].strip() == "none"
    assert client.get_experiment(run.info.experiment_id).name == "cells"
    (out / "logs" / "mlflow_run_id").unlink()  # the checkpoint also has it
    with start(out, 15, run_id, experiment="cells") as sinks:
        sinks.log(20, {"iteration": 20, "total_loss": 2.5})
        assert client.get_run(run_id).info.status == "RUNNING"
    assert client.get_run(run_id).info.status == "FINISHED"
    history = [(m.step, m.value) for m in client.get_metric_history(run_id, "total_loss")]
    assert history == [(0, 0.0), (10, 1.25), (20, 2.5)]
    assert (out / "logs" / "mlflow_run_id").read_text().strip() == run_id
    assert [file.path for file in client.list_artifacts(run_id)] == ["config.yaml"]
    assert [path.name for path in tmp_path.iterdir()] == ["my_run"] and warnings_of(caplog) == []


def test_a_lost_store_starts_a_new_run_and_a_run_that_the_user_names_must_exist(tmp_path, caplog):
    lost = "0123456789abcdef0123456789abcdef"
    with start(tmp_path / "a", stored=lost) as sinks:
        assert sinks.state()["mlflow_run_id"] != lost
    with start(tmp_path / "b", id=lost) as sinks:
        assert sinks.names == ["training_metrics.json"]
    first, second = warnings_of(caplog)
    assert lost in first and "a new one is started" in first
    assert lost in second and second.endswith("training continues without MLflow")


def test_an_unreachable_server_or_a_missing_package_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with start(tmp_path / "a", tracking_uri="http://me:hunter2@127.0.0.1:9") as sinks:
        assert sinks.names == ["training_metrics.json"]
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with start(tmp_path / "b") as sinks:
        assert sinks.names == ["training_metrics.json"]
    server, package = warnings_of(caplog)
    assert "127.0.0.1:9" in server and "hunter2" not in server
    assert "pip install 'dinov2_custom[mlflow]'" in package


def test_long_values_strange_keys_and_a_store_that_disappears(tmp_path, caplog):
    values = default_values()
    values["mlflow"]["enabled"] = True
    values["train"] |= {"dataset_path": "x" * 7000, "my key (é)?": 1}
    with open_sinks(tmp_path, values, 0, None, None) as sinks:
        run_id = sinks.state()["mlflow_run_id"]
        params = client_of(tmp_path).get_run(run_id).data.params
        assert set(params["train.dataset_path"]) == {"x"} and params["train.my key (é)?".translate(UNDERSCORES)] == "1"
        shutil.rmtree(tmp_path / "logs" / "mlruns")
        for step in range(3):
            sinks.log(step, {"iteration": step, "total_loss": 1.0})
        assert sinks.names == ["training_metrics.json"]
    assert len((tmp_path / "training_metrics.json").read_text().splitlines()) == 3
    (warning,) = warnings_of(caplog)
    assert "nothing more is sent there" in warning


def test_disabled_imports_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    options = default_values()["mlflow"]
    assert mlflow_sink.open_mlflow(options, tmp_path, {}, "run") is None
