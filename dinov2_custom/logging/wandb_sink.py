"""Log metrics to Weights & Biases without ever prompting, waiting indefinitely or ending the run.

Without an API key or a connection, the run is recorded offline, in files that ``wandb sync`` uploads later; without the
package it is not recorded. Both log one warning. A resumed run continues under the same id, which is stored in
``wandb_run_id`` next to the log files and in checkpoints. The API key is read by W&B itself (WANDB_API_KEY,
``wandb login``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dinov2_custom.errors import missing
from dinov2_custom.files import atomic_write

logger = logging.getLogger("dinov2")
ID_FILE = "wandb_run_id"
DEFAULT_PROJECT = "dinov2_custom"
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0
_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


class WandB:
    """Write rows to the history of one W&B run, with the iteration as step."""

    name = "W&B"
    retries = False

    def __init__(self, run: Any, teardown: Callable[[], None]):
        self._run, self._teardown = run, teardown

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log(dict(row), step=step)

    def summarize(self, facts: Mapping[str, str]) -> None:
        self._run.summary.update(dict(facts))

    def state(self) -> dict[str, str]:
        return {"wandb_run_id": self._run.id}

    def close(self, exit_code: int) -> None:
        try:
            self._run.finish(exit_code=exit_code)
        finally:
            self._teardown()  # finish() may return before the last rows are on disk


def open_wandb(
    options: Mapping[str, Any],
    folder: Path,
    config: Mapping[str, Any],
    default_name: str,
    stored_run_id: str | None = None,
) -> WandB | None:
    """Start or resume a W&B run; return None if it is disabled or cannot be started.

    The id is ``options["id"]``, or else WANDB_RUN_ID, the id in ``folder``, ``stored_run_id``, or a new one.

    Args:
        options: section ``wandb`` of the configuration.
        folder: parent of W&B's folder ``wandb`` and of the id file.
        config: configuration to record with the run.
        default_name: name of the run if ``options`` has none.
    """
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # treat empty as unset; W&B rejects ``WANDB_MODE=``
    mode = _mode(options["mode"])
    if mode == "disabled":
        return None
    try:
        import wandb
    except Exception as e:  # a broken installation raises anything
        logger.warning(
            missing("wandb", f"wandb.mode={options['mode']}", got=f"got {type(e).__name__}: {e}")
            + "; training continues without W&B"
        )
        return None
    reasons = []
    for attempt in ("online", "offline") if mode == "online" else ("offline",):
        try:
            if attempt == "online" and not _has_credentials(wandb):
                reasons.append("no API key (set WANDB_API_KEY or run: wandb login)")
                continue
            run_id = _run_id(options["id"], folder, stored_run_id)
            run = _start(wandb, attempt, options, folder, default_name, run_id)
            run.config.update(dict(config), allow_val_change=True)
        except Exception as e:
            reasons.append(without_secrets(f"{type(e).__name__}: {e}".partition("\n")[0]))
            with contextlib.suppress(Exception):
                wandb.teardown()  # otherwise W&B considers the id in use
            continue
        _describe(run, attempt, folder, reasons)
        return WandB(run, wandb.teardown)
    logger.warning(f"wandb.mode={options['mode']}: {'; '.join(reasons)}; training continues without W&B")
    return None


def without_secrets(text: str) -> str:
    """Return ``text`` with the values of secret environment variables redacted."""
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, f"<{name}>")
    return text


def _mode(wanted: str) -> str:
    """Return the configured mode, or a more restricted one from WANDB_MODE, for example on nodes without network."""
    environment = {"dryrun": "offline"}.get(os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_MODE", ""))
    order = ["disabled", "offline", "online"]
    if environment in order and order.index(environment) < order.index(wanted):
        logger.info(f"W&B: mode={environment}, from the environment variable WANDB_MODE")
        return environment
    return wanted


def _has_credentials(wandb: Any) -> bool:
    """Return whether W&B has an API key, without prompting."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return bool(wandb.login(prompt=False, verify=False))


def _run_id(given: str, folder: Path, stored_run_id: str | None) -> str:
    """Determine the run's id and write it to ``folder``."""
    file = folder / ID_FILE
    kept = file.read_text().strip() if file.exists() else ""
    run_id = given or os.environ.get("WANDB_RUN_ID") or kept or stored_run_id or secrets.token_hex(4)
    if run_id != kept:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as out:
            out.write(run_id + "\n")
    return run_id


def _start(wandb: Any, mode: str, options: Mapping[str, Any], folder: Path, default_name: str, run_id: str) -> Any:
    tags = options["tags"]
    if isinstance(tags, str | int | float):
        tags = [] if tags == "" else [tags]
    settings = wandb.Settings(
        console="off",  # do not capture stdout and stderr
        silent=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
    )
    return wandb.init(
        project=options["project"] or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        entity=options["entity"] or None,
        name=options["name"] or os.environ.get("WANDB_NAME") or default_name,
        group=options["group"] or None,
        tags=[str(tag) for tag in tags] or None,
        id=run_id,
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=str(folder),
        settings=settings,
    )


def _describe(run: Any, mode: str, folder: Path, reasons: list[str]) -> None:
    """Log the location of the run, as a warning if it differs from the requested one."""
    if mode == "online":
        logger.info(f"W&B: mode=online id={run.id} url={run.url}")
        return
    later = f"send it with: wandb sync --yes {folder / 'wandb'}/offline-run-*-{run.id}"
    if reasons:
        logger.warning(f"wandb.mode=online: {'; '.join(reasons)}; recorded offline, id={run.id}; {later}")
    else:
        logger.info(f"W&B: mode=offline id={run.id}; {later}")
