"""Plot all metrics of one or several runs, with one panel per metric, as a PNG and a self-contained HTML page."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2_custom import cli
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.errors import ConfigError, DataError
from dinov2_custom.files import atomic_write, write_text
from dinov2_custom.plan.prices import Price, find_by_user_name, load_prices
from dinov2_custom.plots.epochs import (
    iterations_per_epoch,
    iterations_per_pass,
    num_processes,
    seconds_per_iteration,
    warmup_iterations,
)
from dinov2_custom.plots.figure import new_figure
from dinov2_custom.plots.forecast import Forecast, make_forecast
from dinov2_custom.plots.metrics_file import Run, dino_loss, epoch_means, find_runs, read_run, short_names
from dinov2_custom.plots.page import make_page
from dinov2_custom.train.gpus import find_gpu

COLUMNS = 3
# Okabe and Ito's palette, which colour-blind readers can distinguish
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6BB1")
STYLES = ("-", "--", ":")
NOISY_POINTS = 200
FEW_POINTS = 40
SMOOTHED_POINTS = 60

FORECAST = ("eval_knn", "eval_rankme", "eval_loss", "val_ap", "val_miou", "total_loss")  # the first that the run has

Value = Callable[[dict], float | None]


class Line(NamedTuple):
    """One curve: its label, and a function from a row to its value (None if the row has none)."""

    label: str
    value: Value


class Level(NamedTuple):
    """A reference line: a label, and a function from a run to its value (None if it has none)."""

    label: str
    value: Callable[[Run], float | None]


class Panel(NamedTuple):
    """One plot. ``levels`` are its reference lines; ``noisy`` curves with many points are smoothed."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    levels: tuple[Level, ...] = ()
    noisy: bool = True
    log: bool = False
    from_zero: bool = False


class Forecasts(NamedTuple):
    """The metrics, forecasts, and reasons for those that were not made, by the number of the run."""

    metrics: dict[int, str]
    found: dict[int, Forecast]
    refused: dict[int, str]


def _key(name: str, factor: float = 1.0) -> Value:
    return lambda row: None if row.get(name) is None else row[name] * factor


def _data_wait(row: dict) -> float | None:
    """Return the data wait in per cent, computed from the two times for upstream's rows."""
    if not row.get("iter_time"):
        return None
    return 100 * row.get("data_wait", row.get("data_time", 0.0) / row["iter_time"])


def uniform_level(run: Run) -> float | None:
    """Return ln(prototypes) of the DINO head: loss and entropy of a network with equal outputs for all images."""
    prototypes = run.setting("dino.head_n_prototypes")
    return math.log(prototypes) if isinstance(prototypes, int) and prototypes > 1 else None


def _beside(key: str, curve: str) -> Callable[[Run], float | None]:
    """Return a function to the value of ``key`` in the latest row with ``curve``: earlier ones may not belong to it."""
    return lambda run: next((row.get(key) for row in reversed(run.rows) if row.get(curve) is not None), None)


UNIFORM = Level("ln(prototypes)", uniform_level)


PANELS = (
    Panel(
        "Total loss",
        "nats, as reported",
        (Line("training", _key("total_loss")), Line("evaluation", _key("eval_loss"))),
        from_zero=True,
    ),
    Panel(
        "kNN accuracy",
        "fraction, labelled images",
        (Line("teacher", _key("eval_knn")),),
        levels=(
            Level("start", _beside("start_knn", "eval_knn")),
            Level("raw pixels", _beside("pixels_knn", "eval_knn")),
        ),
        from_zero=True,
    ),
    Panel(
        "RankMe of the evaluation",
        "effective dimensions",
        (Line("teacher", _key("eval_rankme")),),
        levels=(Level("start", _beside("start_rankme", "eval_rankme")),),
        from_zero=True,
    ),
    Panel(
        "Similarity to the start",
        "-1 to 1",
        (Line("mean cosine", _key("eval_cosine_to_start")), Line("linear CKA", _key("eval_cka_to_start"))),
        from_zero=True,
    ),
    Panel(
        "Uniformity and alignment",
        "lower is better",
        (Line("uniformity", _key("eval_uniformity")), Line("alignment", _key("eval_alignment"))),
        levels=(
            Level("uniformity, start", _beside("start_uniformity", "eval_uniformity")),
            Level("alignment, start", _beside("start_alignment", "eval_alignment")),
        ),
    ),
    Panel(
        "DINO loss",
        "nats",
        (
            Line("local + global", lambda row: dino_loss(row) if "dino_global_crops_loss" in row else None),
            Line("local crops", _key("dino_local_crops_loss")),
            Line("global crops", _key("dino_global_crops_loss")),
        ),
        levels=(
            Level(UNIFORM.label, lambda run: uniform_level(run) if run.setting("crops.local_crops_number") else None),
        ),
        from_zero=True,
    ),
    Panel("iBOT loss, half", "nats", (Line("", _key("ibot_loss")),), from_zero=True),
    Panel("KoLeo loss, half", "weighted", (Line("", _key("koleo_loss")),)),
    Panel(
        "Teacher's assignments",
        "entropy, nats",
        (Line("of an image, mean", _key("teacher_entropy")), Line("of the mean", _key("prototype_entropy"))),
        levels=(UNIFORM,),
        from_zero=True,
    ),
    Panel("RankMe of a training batch", "effective dimensions", (Line("", _key("rankme")),), from_zero=True),
    Panel(
        "Gradient norm before clipping",
        "norm",
        tuple(
            Line(part.replace("_", " "), _key(f"grad_norm_{part}")) for part in ("backbone", "dino_head", "ibot_head")
        ),
        log=True,
    ),
    Panel(
        "Learning rate",
        "learning rate",
        (Line("network", _key("lr")), Line("prototypes", _key("last_layer_lr"))),
        noisy=False,
    ),
    Panel("Teacher's EMA momentum", "momentum", (Line("", _key("mom")),), noisy=False),
    Panel("Weight decay", "weight decay", (Line("", _key("wd")),), noisy=False),
    Panel(
        "Steps skipped as not finite",
        "since the last start",
        (Line("", lambda row: row.get("skipped_steps") or None),),  # so that healthy runs have no such panel
        noisy=False,
        from_zero=True,
    ),
    Panel(
        "Validation of a decoder",
        "AP or IoU",
        (Line("AP", _key("val_ap")), Line("AP50", _key("val_ap50")), Line("mIoU", _key("val_miou"))),
        noisy=False,
        from_zero=True,
    ),
    Panel("Validation loss of a decoder", "loss", (Line("", _key("val_loss")),), noisy=False),
    Panel("Throughput", "images / s", (Line("", _key("images_per_s")),), from_zero=True),
    Panel("Time spent waiting for data", "% of an iteration", (Line("", _data_wait),), from_zero=True),
    Panel("Peak memory of rank 0", "GiB", (Line("", _key("memory_mib", 1 / 1024)),), noisy=False, from_zero=True),
)


def main(args: argparse.Namespace) -> int:
    """Plot the runs in ``args.runs`` and print the paths of the files; return 0.

    For one run, ``epochs.csv`` contains the means over each pass over the data, if its rows have ``epoch``.
    """
    given = cli.given_flags(cli.history_parser(), args)
    if not args.forecast and (ignored := [flag for dest, flag in given.items() if dest in ("metric", "gpu", "price")]):
        raise ConfigError(f"{', '.join(ignored)}: no effect without --forecast; add --forecast EPOCHS")
    gpu, prices = find_by_user_name(args.gpu) if args.gpu else "", load_prices(given=args.price)
    runs = read_runs(find_runs(args.runs))
    out = Path(args.output_dir or (runs[0].folder if len(runs) == 1 else ".")).expanduser()
    check_output_dir(out, "--output-dir")
    out.mkdir(parents=True, exist_ok=True)
    forecasts, sentences = Forecasts({}, {}, {}), []
    if args.forecast:
        forecasts = forecast_runs(runs, args.metric, args.forecast)
        for number, run in enumerate(runs):
            reason = forecasts.refused.get(number)
            words = (run, forecasts, number, args.forecast, gpu, prices)
            sentences.append(f"{run.name}: " + (bill(*words) if reason is None else f"no forecast, {reason}"))
            print(sentences[-1])
    figure = draw_history(runs, forecasts=forecasts)
    with atomic_write(out / "history.png", "wb") as file:
        figure.savefig(file, format="png")
    print(out / "history.png")
    write_text(out / "history.html", make_page(runs, figure, sentences))
    print(out / "history.html")
    if len(runs) == 1 and (means := epoch_means(runs[0].rows)):
        with atomic_write(out / "epochs.csv") as file:
            table = csv.DictWriter(file, list(dict.fromkeys(name for row in means for name in row)))
            table.writeheader()
            table.writerows(means)
        print(out / "epochs.csv")
    return 0


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs that have rows, and print a warning for each other one.

    Raises:
        DataError: none of them has rows.
    """
    runs, without = [], []
    for folder, name in zip(folders, short_names(folders), strict=True):
        try:
            runs.append(read_run(folder, name))
        except DataError as e:
            without.append(e)
    if not runs:
        raise without[0]
    for reason in without:
        print(f"warning: a run is left out: {reason}", file=sys.stderr)
    return runs


def forecast_runs(runs: Sequence[Run], metric: str | None, epochs: float) -> Forecasts:
    """Extrapolate ``metric`` of each run, by default the first of ``FORECAST`` that it has.

    Args:
        epochs: as ``optim.epochs`` counts them.

    Raises:
        ConfigError: if no run has the metric.
    """
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    if metric is not None and metric not in keys:
        raise ConfigError(f"--metric {metric}: expected a key of the rows, got {', '.join(keys)}")
    forecasts = Forecasts({}, {}, {})
    for number, run in enumerate(runs):
        key, made = _forecast_run(run, [metric] if metric else FORECAST, epochs)
        forecasts.metrics[number] = key
        (forecasts.refused if isinstance(made, str) else forecasts.found)[number] = made
    return forecasts


def _forecast_run(run: Run, metrics: Sequence[str], epochs: float) -> tuple[str, Forecast | str]:
    """Return the first of ``metrics`` that the run has, and its forecast or the reason why there is none."""
    series = {key: _series(run, Line("", _key(key))) for key in metrics}
    key = next((key for key, (x, _) in series.items() if x.size), "")
    if not key:
        return "", f"this run has no {' or '.join(metrics)}"
    try:
        length, warmup = iterations_per_epoch(run), warmup_iterations(run)
    except ConfigError as e:
        return key, str(e)
    if length is None:
        return key, "the length of an epoch is unknown: the rows have no epoch, and there is no length in config.yaml"
    (x, y), last = series[key], run.rows[-1]["iteration"]
    made = make_forecast(x[x >= warmup], y[x >= warmup], last + epochs * length, since=last)
    return key, f"{key}: {made}" if isinstance(made, str) else made


def bill(run: Run, forecasts: Forecasts, number: int, epochs: float, gpu: str, prices: Mapping[str, Price]) -> str:
    """Return what ``epochs`` more epochs take, cost and change.

    30 more epochs (3,000 iterations, 86 passes over the data), 4.1 h, $13: eval_knn +0.1 +- 0.02.

    Args:
        gpu: a key of ``GPUS``: the GPU that ran, if the run does not name its device; else "".
    """
    made, iterations = forecasts.found[number], epochs * iterations_per_epoch(run)
    amounts = [f"{iterations:,.0f} iterations"]
    if per_pass := iterations_per_pass(run):
        amounts.append(f"{iterations / per_pass:,.3g} passes over the data")
    parts = [f"{epochs:,g} more epoch{'s' if epochs != 1 else ''} ({', '.join(amounts)})"]
    if seconds := seconds_per_iteration(run):
        hours = iterations * seconds / 3600
        parts += [f"{hours:.3g} h", _price_of(hours, run, gpu, prices)]
    spread = (made.change_high - made.change_low) / 2
    return f"{', '.join(parts)}: {forecasts.metrics[number]} {made.change:+.3g} +- {spread:.2g} by {made.family}"


def _price_of(hours: float, run: Run, gpu: str, prices: Mapping[str, Price]) -> str:
    """Return the price on the machine that ran, whose hours these are, or why there is none."""
    own, processes = find_gpu(run.device) if run.device else gpu, num_processes(run)
    if gpu and gpu != own:
        return f"no price for {gpu}: the hours are those of {run.device}"
    if run.device and not own:
        return f"no price of {run.device}"
    if not processes:
        return "no price, the rows do not show the number of GPUs"
    if not own:
        return "no price, its log does not name the GPU (--gpu GPU)"
    if own not in prices:
        return f"no price of {own} (--price {own}=DOLLARS)"
    spot, on_demand = (hours * processes * dollars for dollars in prices[own])
    return f"${on_demand:.3g}" + (f" (spot ${spot:.3g})" if spot != on_demand else "")


def draw_history(runs: Sequence[Run], panels: Sequence[Panel] = PANELS, forecasts: Forecasts | None = None):
    """Return a matplotlib figure with a panel for every metric that any run has.

    ``forecasts`` are drawn into the panels of their metrics, or one of their own.

    For one run, each curve has a colour. For several, each run has a colour and each curve a dash pattern.
    """
    forecasts = forecasts or Forecasts({}, {}, {})
    for key in {forecasts.metrics[number] for number in forecasts.found}:  # one, if no panel shows it: see FORECAST
        if not any(_shows(panel, key) for panel in panels):
            panels = (Panel(key, "as reported", (Line("", _key(key)),)), *panels)
    panels = [panel for panel in panels if any(_series(run, line)[0].size for run in runs for line in panel.lines)]
    grid = -(-len(panels) // COLUMNS)
    figure = new_figure(figsize=(5.2 * COLUMNS, 3.1 * grid + 0.7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.subplots(grid, COLUMNS, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, runs)
        for number, forecast in forecasts.found.items():
            if _shows(panel, forecasts.metrics[number]):
                colour = _colour(number) if len(runs) > 1 else "#444444"
                axis.fill_between(forecast.x, forecast.low, forecast.high, color=colour, alpha=0.18, linewidth=0)
                axis.plot(forecast.x, forecast.y, color=colour, linestyle="--", linewidth=1.5)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    last = max(run.rows[-1]["iteration"] for run in runs)
    figure.suptitle(f"{runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}, up to iteration {last:,}", fontsize=14)
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=_colour(n), linewidth=3, label=run.name) for n, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 4), frameon=False)
    return figure


def _shows(panel: Panel, metric: str) -> bool:
    """Return whether a curve of ``panel`` is the value of ``metric`` itself."""
    return any(line.value({metric: 1.0}) == 1.0 for line in panel.lines)


def _draw_panel(axis, panel: Panel, runs: Sequence[Run]) -> None:
    single = len(runs) == 1
    lines = [line for line in panel.lines if any(_series(run, line)[0].size for run in runs)]
    for n, run in enumerate(runs):
        for m, line in enumerate(lines):
            colour, style = _colour(m if single else n), _style(panel, m, single)
            _draw_curve(axis, *_series(run, line), colour, style, panel.noisy)
    _draw_levels(axis, panel, runs)
    if single:
        latest = _series(runs[0], lines[0])[1][-1]
        axis.set_title(f"{latest:.4g}", loc="right", fontsize=10, color="#555555")
    _add_legend(axis, panel, lines, single)
    axis.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axis.set(xlabel="iteration", ylabel=panel.unit)
    if panel.log:
        axis.set_yscale("log")
    else:
        axis.ticklabel_format(axis="y", style="plain", useOffset=False)
    if panel.from_zero:
        bottom, top = axis.get_ylim()
        top = max(top, 1.15 * axis.dataLim.y1)  # room for the label above a line at the top
        axis.set_ylim(bottom if axis.dataLim.y0 < 0 else 0, top)
    axis.locator_params(axis="x", nbins=6)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    per_pass = [iterations_per_pass(run) for run in runs]
    if all(per_pass) and max(per_pass) < 1.01 * min(per_pass):
        passes = axis.secondary_xaxis("top", functions=(lambda x: x / per_pass[0], lambda x: x * per_pass[0]))
        passes.set_xlabel("passes over the data", fontsize=8, color="#777777", labelpad=4)
        passes.tick_params(labelsize=8, colors="#777777")
        passes.spines["top"].set_visible(False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_curve(axis, x: np.ndarray, y: np.ndarray, colour: str, style: str, noisy: bool) -> None:
    if noisy and x.size > NOISY_POINTS:
        axis.plot(x, y, color=colour, linewidth=0.6, alpha=0.25)
        width = x.size // SMOOTHED_POINTS
        x, y = (np.convolve(values, np.full(width, 1 / width), mode="valid") for values in (x, y))
    marker = {"marker": "o", "markersize": 3} if x.size <= FEW_POINTS else {}
    axis.plot(x, y, color=colour, linestyle=style, linewidth=1.5, **marker)


def _draw_levels(axis, panel: Panel, runs: Sequence[Run]) -> None:
    ends = [y[-1] for run in runs for line in panel.lines if (y := _series(run, line)[1]).size]
    for label, value in panel.levels:
        for level in sorted({level for run in runs if (level := value(run)) is not None}):
            axis.axhline(level, color="#777777", linestyle=(0, (1, 1.5)), linewidth=1.2, zorder=1)
            # on the side of the line where the nearest curve does not end
            below = bool(ends) and min(ends, key=lambda end: abs(end - level)) > level
            axis.annotate(
                f"{label} = {level:.3g}" if label != UNIFORM.label else f"{label} = {level:.2f}",
                (1, level),
                xycoords=("axes fraction", "data"),
                xytext=(-2, -3 if below else 3),
                textcoords="offset points",
                ha="right",
                va="top" if below else "baseline",
                fontsize=8,
                color="#555555",
            )
            axis.margins(y=0.12)


def _add_legend(axis, panel: Panel, lines: Sequence[Line], single: bool) -> None:
    if len(lines) < 2:
        return
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_colour(m) if single else "#444444", linestyle=_style(panel, m, single), label=line.label)
        for m, line in enumerate(lines)
    ]
    # below the axes, where it hides no curve
    axis.legend(handles=handles, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3)


def _style(panel: Panel, number: int, single: bool) -> str:
    """Return a dashed style for the second curve if colour is not enough: several runs, or coinciding curves."""
    return "-" if single and panel.noisy else STYLES[number % len(STYLES)]


def _series(run: Run, line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Return the iterations and values of all finite points."""
    points = [(row["iteration"], value) for row in run.rows if (value := line.value(row)) is not None]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


if __name__ == "__main__":
    cli.main("history")
