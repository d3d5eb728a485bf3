"""Read the metrics and configuration of a run directory, even while the run is writing them, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from dinov2_custom.errors import DataError
from dinov2_custom.files import parse_json_object
from dinov2_custom.train.gpus import find_device

METRICS_FILE = "training_metrics.json"


class Run(NamedTuple):
    """One run.

    Attributes:
        rows: by iteration.
        config: empty if the directory has none.
        device: name of the GPU or CPU; empty if the directory has no log that contains it.
    """

    name: str
    rows: list[dict]
    config: dict[str, Any]
    device: str = ""
    folder: Path | None = None

    def setting(self, key: str) -> Any:
        """Return the value of a dotted key, or None."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_metrics(path: str | Path) -> list[dict]:
    """Return the rows of a run's ``training_metrics.json`` by iteration, ignoring lines truncated by a kill.

    Values that are no numbers are left out.

    Raises:
        DataError: if there is no such file, or it has no rows.
    """
    rows = {}
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as e:
        raise DataError(f"expected a run's {METRICS_FILE}, got {e.strerror} at {path}; check the path") from e
    for line in lines:
        try:
            row = parse_json_object(line, finite=False)
            iteration = int(row["iteration"])
            rows[iteration] = {key: v for key, v in row.items() if _is_number(v)} | {"iteration": iteration}
        except (ValueError, KeyError, TypeError, OverflowError):  # OverflowError: int() of an infinity
            continue
    if not rows:
        raise DataError(
            f"expected rows of metrics, got none in {path}; a run writes the first one after its first iteration"
        )
    return [rows[iteration] for iteration in sorted(rows)]


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 1000)  # so that float() works


def epoch_means(rows: Sequence[dict]) -> list[dict]:
    """Return one row for each started pass over the data: ``pass`` (from 1), ``rows``, and the means of all values.

    ``epoch`` and ``iteration`` are the last ones of the pass instead. Rows without ``epoch`` (upstream's) are left out,
    as are values that are not finite.
    """
    passes: dict[int, list[dict]] = {}
    for row in rows:
        if row.get("epoch") and math.isfinite(row["epoch"]):
            passes.setdefault(math.ceil(row["epoch"]), []).append(row)
    means = []
    for number, members in passes.items():
        mean: dict[str, float] = {"pass": number, "rows": len(members)}
        for name in dict.fromkeys(name for row in members for name in row):
            values = [v for row in members if isinstance(v := row.get(name), int | float) and math.isfinite(v)]
            if values:
                mean[name] = values[-1] if name in ("epoch", "iteration") else fmean(values)
        means.append(mean)
    return means


def dino_loss(row: dict) -> float:
    """Return local + global DINO loss of a row; it is ln(prototypes) for a network with constant output."""
    return row.get("dino_local_crops_loss", 0.0) + row["dino_global_crops_loss"]


def find_runs(places: Sequence[str | Path]) -> list[Path]:
    """Return the run directories among ``places`` or directly inside them, without duplicates, in order.

    A place may also be a metrics file.

    Raises:
        DataError: if some places contain no run; lists all of them.
    """
    found: dict[Path, None] = {}
    missing = []
    for place in map(Path, places):
        if place.name == METRICS_FILE or (place / METRICS_FILE).is_file():
            folders = [place.parent if place.name == METRICS_FILE else place]
        else:
            folders = sorted(file.parent for file in place.glob(f"*/{METRICS_FILE}"))
        if not folders:
            missing.append(str(place))
        found |= dict.fromkeys(folders)
    if missing:
        raise DataError(
            f"expected run directories, each with a {METRICS_FILE}, got none at {', '.join(missing)}; give the "
            "--output-dir of a training, which has one after its first iterations"
        )
    return list(found)


def read_run(folder: Path, name: str) -> Run:
    """Read one run directory."""
    config, log = {}, ""  # neither is needed to draw the curves
    with suppress(OSError, ValueError, yaml.YAMLError):
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    with suppress(OSError):
        log = (folder / "logs" / "log.txt").read_text(encoding="utf-8", errors="replace")
    rows = read_metrics(folder / METRICS_FILE)
    return Run(name, rows, config if isinstance(config, dict) else {}, find_device(log) or "", folder)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each folder from the path components that distinguish it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) == 1:
        return [own[-1] for own in parts]
    front, back = _shared(parts), _shared([own[::-1] for own in parts])
    return ["/".join(own[front : len(own) - back] or own[-1:]) for own in parts]


def _shared(parts: Sequence[tuple[str, ...]]) -> int:
    count = 0
    while all(len(own) > count + 1 for own in parts) and len({own[count] for own in parts}) == 1:
        count += 1
    return count
