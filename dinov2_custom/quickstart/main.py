"""Run the quickstart: cut tiles, train, measure, draw, report.

``photos.py`` has the tiles, ``measure.py`` the measurements, ``pictures.py`` and ``plots/`` the figures, ``report.py``
the page.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.errors import ConfigError, command, optional, small_recipe
from dinov2_custom.eval.neighbours import NEIGHBOURS
from dinov2_custom.files import write_text
from dinov2_custom.plots import plot_loss_curve
from dinov2_custom.plots.metrics_file import Run, read_run
from dinov2_custom.quickstart.measure import Measured, Measurement, measure_run
from dinov2_custom.quickstart.photos import Tiling, cut_photos
from dinov2_custom.quickstart.pictures import draw_features, draw_neighbours, find_neighbours
from dinov2_custom.quickstart.report import FIELDS, Pictures, make_report
from dinov2_custom.train.train import main as train

DEFAULT_TILING = Tiling()
SHOWN = ("cat", "coffee", "astronaut", "rocket", "gravel", "brick")


def main(args: argparse.Namespace, tiling: Tiling = DEFAULT_TILING) -> int:
    """Run the quickstart; return 0, 1 if a run collapsed, or the exit code of a training that was stopped.

    Writes below ``args.output_dir``: ``report.html``, ``tiles/``, ``seed_<n>/`` (a training run each),
    ``loss_curve.png``, ``neighbours.png``, ``pca.png`` (all three of the first seed) and ``quickstart.json``.

    Raises:
        DINOv2Error: the configuration is invalid, or scikit-image or matplotlib is missing; raised before any training.
    """
    out = Path(args.output_dir).expanduser().absolute()
    check_output_dir(str(out))
    unknown = args.allow_unknown_keys
    cfg = load_run_config(args.config_file, args.opts, allow_unknown_keys=unknown, require_dataset=False)
    if not cfg.evaluation.online.every:
        raise ConfigError(
            "evaluation.online.every: expected at least 1, as the quickstart reports this evaluation, got 0 -> "
            "evaluation.online.every=100"
        )
    optional("matplotlib.figure", "figures")
    counts = cut_photos(out / "tiles", tiling)
    train_count, held_out_count = (sum(counts[part].values()) for part in ("train", "held_out"))
    print(f"tiles: {train_count:,} to train on, {held_out_count:,} held out, from {len(counts['train'])} photographs")

    results: dict[int, Measurement] = {}
    runs: dict[int, Run] = {}
    for seed in args.seeds:
        run = out / f"seed_{seed}"
        started = time.monotonic()
        code = train(training_args(args, run, out / "tiles", seed))
        if code:
            return code
        print(f"training: seed={seed} seconds={time.monotonic() - started:.0f}")
        runs[seed] = read_run(run, f"seed {seed}")
        measured = measure_run(run, out / "tiles", runs[seed].rows[-1])
        results[seed] = measured.numbers
        if seed == args.seeds[0]:
            pictures = draw_pictures(measured, out, tiling)
            plot_loss_curve(runs[seed].rows, out / "loss_curve.png", measured.numbers.num_prototypes)

    (out / "quickstart.json").write_text(json.dumps({seed: r._asdict() for seed, r in results.items()}, indent=1))
    page = make_report(results, list(runs.values()), counts, pictures, next_commands(out, args.seeds[0]))
    write_text(out / "report.html", page)
    for line in [*describe(results, held_out_count, len(counts["train"])), *describe_files(out, args.seeds[0])]:
        print(line)
    return int(any(result.collapse for result in results.values()))


def draw_pictures(measured: Measured, out: Path, tiling: Tiling) -> Pictures:
    """Draw neighbours.png and pca.png into ``out``."""
    draw_neighbours(find_neighbours(measured.networks, measured.train, measured.held_out), out / "neighbours.png")
    backbones = {name: measured.networks[name] for name in ("untrained", "trained")}
    shares = draw_features(backbones, SHOWN, tiling.size, measured.crop, measured.normalize, out / "pca.png")
    return Pictures(out / "neighbours.png", out / "pca.png", shares)


def training_args(args: argparse.Namespace, run: Path, tiles: Path, seed: int) -> argparse.Namespace:
    """Return the arguments of the training command for one seed."""
    labelled = {"knn_train": tiles / "train", "knn_val": tiles / "held_out"}
    knn = [f"evaluation.online.{name}=LabelledFolder:root={folder}" for name, folder in labelled.items()]
    start = "evaluation.online.compare_to_start=true"
    opts = [*args.opts, *knn, start, f"train.dataset_path={tiles / 'train'}", f"train.seed={seed}"]
    return argparse.Namespace(
        config_file=args.config_file,
        opts=opts,
        output_dir=str(run),
        no_resume=args.no_resume,
        eval_only=False,
        allow_unknown_keys=args.allow_unknown_keys,
    )


def describe(results: dict[int, Measurement], num_tiles: int, num_photos: int) -> list[str]:
    """Return the summary, one line each: accuracies, gain, entropies, and a warning for every collapsed run."""
    lines = [f"kNN accuracy (k={NEIGHBOURS}) on {num_tiles:,} held-out tiles of {num_photos} photographs"]
    for label, field in FIELDS.items():
        lines.append(f"  {label:<18}{_mean_and_spread([getattr(r, field) for r in results.values()])}")
    lines.append(f"  {'gained by training':<18}{_mean_and_spread([r.gain for r in results.values()])}")
    for seed, r in results.items():
        lines.append(
            f"seed {seed}: teacher's assignments have an entropy of {r.teacher_entropy:.2f} nats a tile and "
            f"{r.prototype_entropy:.2f} over all tiles, {r.prototypes_used} of {r.num_prototypes} prototypes used"
        )
        if r.collapse:
            lines.append(f"ALARM: seed {seed} collapsed: {r.collapse}")
    return lines


def _mean_and_spread(values: Sequence[float]) -> str:
    text = f"{statistics.mean(values):7.3f}"
    if len(values) > 1:
        text += f"   from {min(values):.3f} to {max(values):.3f} over {len(values)} seeds"
    return text


def describe_files(out: Path, seed: int) -> list[str]:
    """Return lines on where the results are and what to do next."""
    text, line = next(iter(next_commands(out, seed).items()))
    return [
        f"report: {(out / 'report.html').as_uri()}  (open it in a browser)",
        f"training run: {out / f'seed_{seed}'}",
        f"next: {text}: {line}",
    ]


def next_commands(out: Path, seed: int) -> dict[str, str]:
    """Return commands to go on with, by what they do."""
    run, recipe = shlex.quote(str(out / f"seed_{seed}")), small_recipe("configs/small.yaml")
    train_command = f"{command('run/train/train.py')} {recipe} --output-dir out train.dataset_path=/my/images"
    return {
        "train on your own images": train_command,
        "draw all curves of this run": f"{command('run/plots/history.py')} {run}",
        "write the features of your images by this network": f"{command('run/embed.py')} {run} /my/images",
    }
