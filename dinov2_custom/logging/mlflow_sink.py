"""Log metrics to MLflow: into files of the run directory by default, or to a tracking server.

A sink never ends a run: without the package or the server, one warning is logged. A resumed run continues the MLflow
run whose id is stored in ``mlflow_run_id`` next to the log files and in checkpoints. Credentials of a server are read
by MLflow itself (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN).
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dinov2_custom.errors import missing
from dinov2_custom.files import atomic_write
from dinov2_custom.logging.wandb_sink import without_secrets
from dinov2_custom.utils.paths import without_credentials

logger = logging.getLogger("dinov2")
ID_FILE = "mlflow_run_id"
DEFAULT_EXPERIMENT = "dinov2_custom"
_NAME_LENGTH = 250
_PARAM_LENGTH = 500  # the most that every server stores
_TAG_LENGTH = 5000
_PARAMS_PER_CALL = 100  # the most that a call takes
# MLflow's own variables. Its defaults refuse the file store, and retry a request to a dead server for many minutes
_ENVIRONMENT = {
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


class MLflow:
    """Write rows as metrics of one MLflow run, with the iteration as step."""

    name = "MLflow"
    retries = False

    def __init__(self, client: Any, run_id: str, metric: Callable[[str, float, int, int], Any]):
        self._client, self._run_id, self._metric = client, run_id, metric

    def log(self, step: int, row: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(_name(key), float(value), now, step) for key, value in row.items() if key != "iteration"
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def summarize(self, facts: Mapping[str, str]) -> None:
        for key, value in facts.items():
            self._client.set_tag(self._run_id, _name(key), value[:_TAG_LENGTH])

    def state(self) -> dict[str, str]:
        return {"mlflow_run_id": self._run_id}

    def close(self, exit_code: int) -> None:
        stopped = "KILLED" if exit_code > 128 else "FAILED"  # 128 + signal
        self._client.set_terminated(self._run_id, stopped if exit_code else "FINISHED")


def open_mlflow(
    options: Mapping[str, Any],
    folder: Path,
    config: Mapping[str, Any],
    default_name: str,
    stored_run_id: str | None = None,
) -> MLflow | None:
    """Start or resume an MLflow run; return None if it is disabled or cannot be started.

    The id is ``options["id"]``, or else MLFLOW_RUN_ID, the id in ``folder``, ``stored_run_id``, or a new one.

    Args:
        options: section ``mlflow`` of the configuration.
        folder: parent of the file store ``mlruns`` and of the id file.
        config: configuration to record with the run: its values as parameters at the first start, and the file
            ``config.yaml`` at each start, because MLflow does not change parameters.
        default_name: name of the run if ``options`` has none.
    """
    if not options["enabled"]:
        return None
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient
    except Exception as e:  # a broken installation raises anything
        words = missing("mlflow", "mlflow.enabled", got=f"got {type(e).__name__}: {e}")
        logger.warning(f"{words}; training continues without MLflow")
        return None
    uri = options["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
    shown = without_credentials(uri)
    try:
        client = MlflowClient(tracking_uri=uri)
        run_id = _continued(client, options["id"], folder, stored_run_id)
        if run_id is None:
            run_id = client.create_run(
                _experiment(client, options["experiment"]), run_name=options["name"] or default_name
            ).info.run_id
            params = [Param(_name(key), text[:_PARAM_LENGTH]) for key, text in _flat(config)]
            for start in range(0, len(params), _PARAMS_PER_CALL):
                client.log_batch(run_id, params=params[start : start + _PARAMS_PER_CALL])
        client.log_dict(run_id, dict(config), "config.yaml")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / ID_FILE) as out:
            out.write(run_id + "\n")
    except Exception as e:  # MLflow's, and those of its connections
        reason = without_secrets(f"{type(e).__name__}: {e}".partition("\n")[0]).replace(uri, shown)
        logger.warning(f"mlflow.enabled: {reason}, at {shown}; training continues without MLflow")
        return None
    logger.info(f"MLflow: tracking_uri={shown} id={run_id}")
    return MLflow(client, run_id, Metric)


def _continued(client: Any, given: str, folder: Path, stored_run_id: str | None) -> str | None:
    """Return the id of the run to continue, set to running; None to start another.

    Raises:
        Exception: MLflow's, if a run that the user named does not exist.
    """
    file = folder / ID_FILE
    named = given or os.environ.get("MLFLOW_RUN_ID")
    run_id = named or (file.read_text().strip() if file.exists() else "") or stored_run_id
    if not run_id:
        return None
    if not named and not _exists(client, run_id):
        logger.warning(f"MLflow: expected the run {run_id} of the earlier start, got none there; a new one is started")
        return None
    client.update_run(run_id, status="RUNNING")
    return run_id


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as e:
        if e.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _experiment(client: Any, given: str) -> str:
    name = given or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


def _name(key: str) -> str:
    """Return ``key`` as MLflow accepts it; a name that it refuses would end the reporting."""
    return re.sub(r"[^\w/.: -]", "_", key, flags=re.ASCII)[:_NAME_LENGTH]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)
