"""Convert epochs to iterations, and iterations to passes over the data and to seconds, from a run's files, torch-free.

An epoch is what ``optim.epochs`` counts, a pass what the key ``epoch`` of the rows counts.
"""

from __future__ import annotations

import math

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2_custom.configs.load import with_defaults
from dinov2_custom.errors import ConfigError, reason_of
from dinov2_custom.plots.metrics_file import Run
from dinov2_custom.train.course import RunLength, run_length

WINDOW = 20  # iterations over which a row's ``iter_time`` is a mean


def iterations_per_pass(run: Run) -> float | None:
    """Return the number from the latest row with ``epoch``, or None if there is none."""
    for row in reversed(run.rows):
        if 0 < (row.get("epoch") or 0) < math.inf:
            return (row["iteration"] + 1) / row["epoch"]
    return None


def iterations_per_epoch(run: Run) -> float | None:
    """Return the length of an epoch by the configuration; one pass for a run without (a decoder); else None."""
    known = _configured(run)
    return known[0].epoch_length if known else iterations_per_pass(run)


def warmup_iterations(run: Run) -> float:
    """Return the warm-up of the learning rate, 0 if there is no configuration."""
    if not (known := _configured(run)):
        return 0
    length, warmup = known
    if not length.max_hours:
        return warmup
    seconds = seconds_per_iteration(run)  # a run by the clock: ``warmup`` is a share of its time
    return warmup / length.total * length.max_hours * 3600 / seconds if seconds else 0


def seconds_per_iteration(run: Run) -> float | None:
    """Return the mean seconds, including evaluations and saves, or None if the rows have no ``iter_time``.

    The first rows, which include the start, are left out if there are others. A row counts for the iterations since the
    row before it; with a ``train.log_every`` above ``WINDOW``, rows are samples, more of them with evaluations than
    without.
    """
    rows = [row for row in run.rows if 0 < (row.get("iter_time") or 0) < math.inf]
    if not rows:
        return None
    steps = [after["iteration"] - row["iteration"] for row, after in zip(rows, rows[1:], strict=False)]
    weighted = [(row["iter_time"], step) for row, step in zip(rows[1:], steps, strict=True)]
    settled = [
        pair for pair, row in zip(weighted, rows[1:], strict=True) if row["iteration"] > rows[0]["iteration"] + WINDOW
    ]
    chosen = settled or weighted or [(rows[0]["iter_time"], 1)]
    return sum(seconds * step for seconds, step in chosen) / sum(step for _, step in chosen)


def num_processes(run: Run) -> int | None:
    """Return the number of GPUs, images of an iteration over those of a process, by the latest row that has them.

    None if no row has them: upstream's, a decoder's.
    """
    steps = run.setting("optim.accumulation_steps")
    steps = 1 if steps is None else steps
    for row in reversed(run.rows) if type(steps) is int else ():
        per_process = (row.get("current_batch_size") or 0) * steps
        images = (row.get("images_per_s") or 0) * (row.get("iter_time") or 0)
        if per_process > 0 and images > 0 and math.isfinite(images / per_process):
            return max(round(images / per_process), 1)
    return None


def _configured(run: Run) -> tuple[RunLength, int] | None:
    """Return the length of the run and its warm-up as training computes them; None if it is not known.

    Raises:
        ConfigError: its config.yaml is torn, or has values that cannot be used.
    """
    try:
        if not run.config:
            if run.folder and (run.folder / "config.yaml").exists():
                raise ConfigError("expected sections with keys")
            return None
        length, per_pass = run.setting("train.OFFICIAL_EPOCH_LENGTH"), iterations_per_pass(run)
        if length == "auto" and not per_pass:
            return None
        if length != "auto" and not (type(length) is int and length > 0):
            raise ConfigError(f"train.OFFICIAL_EPOCH_LENGTH: expected a number of iterations or auto, got {length}")
        cfg = with_defaults(OmegaConf.create(run.config))
        processes = num_processes(run) or 1  # hardly changes the length
        batch = cfg.train.batch_size_per_gpu * cfg.optim.accumulation_steps * processes
        known = run_length(cfg, round((per_pass or 0) * batch) or 1, processes)
        return known._replace(max_hours=float(known.max_hours)), known.iterations(cfg.optim.warmup_epochs)
    except (ConfigError, OmegaConfBaseException, AttributeError, TypeError, ValueError, ArithmeticError) as e:
        raise ConfigError(f"config.yaml of that run cannot be read ({reason_of(e)})") from e
