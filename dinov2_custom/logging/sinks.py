"""Destinations for rows of metrics: the run's JSON-lines file, TensorBoard, Weights & Biases and MLflow.

All have the method ``log(step, row)``. A sink never ends a run: a failure is reported once, and training continues.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinov2_custom import distributed
from dinov2_custom.errors import missing
from dinov2_custom.files import append_row, atomic_write, parse_json_object
from dinov2_custom.logging.mlflow_sink import open_mlflow
from dinov2_custom.logging.wandb_sink import open_wandb, without_secrets

logger = logging.getLogger("dinov2")
METRICS_FILE = "training_metrics.json"


class Sink:
    """A destination for rows, which itself defines ``name`` and ``log``.

    ``retries``: whether to keep trying after a failure.
    """

    name: str
    retries = False

    def log(self, step: int, row: Mapping[str, float]) -> None:
        raise NotImplementedError

    def summarize(self, facts: Mapping[str, str]) -> None:
        pass

    def state(self) -> dict[str, str]:
        return {}

    def close(self, exit_code: int) -> None:
        pass


class Sinks:
    """Several sinks as one, which suppresses and reports their exceptions. A context manager that closes them.

    Args:
        sinks: empty on ranks that do not report.
    """

    def __init__(self, sinks: Iterable[Sink] = ()):
        self._sinks = list(sinks)
        self._warned: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Names of the sinks that still accept rows."""
        return [sink.name for sink in self._sinks]

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Write ``row``, the metrics of iteration ``step``, to all sinks."""
        for sink in list(self._sinks):
            try:
                sink.log(step, row)
            except Exception as e:  # each library raises its own errors
                self._report(sink, e, "this row is lost" if sink.retries else "nothing more is sent there")
                if not sink.retries:
                    self._sinks.remove(sink)
                    self._close(sink, 1)

    def summarize(self, facts: Mapping[str, str]) -> None:
        """Show ``facts`` about the whole run, such as its verdict, where a destination has a place for them."""
        for sink in self._sinks:
            try:
                sink.summarize(facts)
            except Exception as e:
                self._report(sink, e, "its summary is incomplete there")

    def add(self, sink: Sink) -> None:
        """Add ``sink`` if there are other sinks, that is, on the rank that reports."""
        if self._sinks:
            self._sinks.append(sink)

    def state(self) -> dict[str, str]:
        """Return what resumes the sinks from a checkpoint: ``wandb_run_id`` and ``mlflow_run_id``, if used."""
        return {key: value for sink in self._sinks for key, value in sink.state().items()}

    def close(self, exit_code: int = 0) -> None:
        """Flush and close all sinks; a nonzero ``exit_code`` means that training is not complete."""
        while self._sinks:
            self._close(self._sinks.pop(), exit_code)

    def _close(self, sink: Sink, exit_code: int) -> None:
        try:
            sink.close(exit_code)
        except Exception as e:
            self._report(sink, e, "its last rows may be missing there")

    def _report(self, sink: Sink, error: Exception, consequence: str) -> None:
        if sink.name not in self._warned:
            self._warned.add(sink.name)
            reason = without_secrets(f"{type(error).__name__}: {error}")
            logger.warning(f"{sink.name}: cannot write metrics, {reason}; {consequence}; training continues")

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(0 if kind is None else 1)


class JsonLines(Sink):
    """Write rows as lines of JSON, with upstream's keys first."""

    retries = True  # a full disk may have space again later

    def __init__(self, path: str | os.PathLike):
        self.path, self.name = Path(path), Path(path).name

    def log(self, step: int, row: Mapping[str, float]) -> None:
        append_row(self.path, {"iteration": step} | dict(row))


class TensorBoard(Sink):
    """Write rows as TensorBoard scalars, and the configuration as text.

    Args:
        folder: folder of the event files; TensorBoard can show the folders of several runs together.
        first_step: next iteration; events that an earlier process wrote from there on are hidden.

    Raises:
        ImportError: if the package ``tensorboard`` is missing.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step or None, flush_secs=30)
        text = json.dumps(config, indent=2)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), first_step)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            self._writer.add_scalar(key, value, step)

    def summarize(self, facts: Mapping[str, str]) -> None:
        for key, value in facts.items():
            self._writer.add_text(key, value)

    def close(self, exit_code: int) -> None:
        self._writer.close()


def open_sinks(
    output_dir: str | os.PathLike,
    config: Mapping[str, Any],
    first_step: int,
    stored_run_id: str | None = None,
    stored_mlflow_run_id: str | None = None,
) -> Sinks:
    """Open the sinks enabled in ``config`` on rank 0; other ranks have none.

    ``training_metrics.json`` is always written. The others keep their files in ``<output_dir>/logs``. A sink
    that cannot be opened is omitted with one warning.

    Args:
        config: configuration of the run as nested dicts, recorded in full; ``train.tensorboard``, ``wandb`` and
            ``mlflow`` select the sinks.
        first_step: next iteration.
        stored_run_id, stored_mlflow_run_id: ids of the W&B and MLflow runs from the checkpoint, used if
            ``<output_dir>/logs`` has none.
    """
    if not distributed.is_main_process():
        return Sinks()
    out = Path(output_dir)
    sinks: list[Sink] = [JsonLines(out / METRICS_FILE)]
    if config["train"]["tensorboard"]:
        folder = out / "logs" / "tensorboard"
        try:
            sinks.append(TensorBoard(folder, config, first_step))
            logger.info(f"TensorBoard: folder={folder}")
        except ImportError as e:
            words = missing("tensorboard", "train.tensorboard", got=f"got none ({e})")
            logger.warning(f"{words}; training continues without it")
        except Exception as e:
            logger.warning(f"train.tensorboard: cannot write to {folder}, {e}; training continues without it")
    # the recorded configuration keeps ``${oc.env:...}`` unresolved, because it may be a secret; resolve it only here
    plain, name = OmegaConf.create(dict(config)), out.resolve().name
    wandb, mlflow = (OmegaConf.to_container(section, resolve=True) for section in (plain.wandb, plain.mlflow))
    opened = (
        open_wandb(wandb, out / "logs", config, name, stored_run_id),
        open_mlflow(mlflow, out / "logs", config, name, stored_mlflow_run_id),
    )
    return Sinks([*sinks, *filter(None, opened)])


def truncate_after(path: str | os.PathLike, iteration: int) -> int:
    """Remove the rows whose iteration is >= ``iteration``, and invalid lines (truncated by a kill).

    Call it from one process only. A missing file stays missing and a file with nothing to remove is not modified; any
    other file is replaced atomically.

    Returns:
        the number of removed lines.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_before(line, iteration)]
    dropped = len(lines) - len(kept)
    if dropped:
        with atomic_write(path, "wb", fsync=True) as file:
            file.writelines(kept)
        logger.info(f"{path}: dropped {dropped} lines from iteration {iteration} on, kept {len(kept)}")
    return dropped


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a file without invalid lines (truncated by a kill); empty if the file is missing.

    Values that are no numbers, which this package does not write, are left out.
    """
    lines = Path(path).read_bytes().splitlines(keepends=True) if Path(path).exists() else []
    rows = [json.loads(line) for line in lines if _is_before(line, sys.maxsize)]
    return [{key: value for key, value in row.items() if isinstance(value, int | float)} for row in rows]


def _is_before(line: bytes, iteration: int) -> bool:
    try:
        row = parse_json_object(line, finite=False)
        return line.endswith(b"\n") and row["iteration"] < iteration
    except (ValueError, KeyError, TypeError):
        return False
