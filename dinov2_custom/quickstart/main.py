"""Run the quickstart: cut tiles, train, measure, draw, report.

``photos.py`` has the tiles, ``measure.py`` the measurements, ``plots/`` the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from dinov2_custom.configs.load import check_output_dir, load_run_config
from dinov2_custom.data.transforms import MaybeToTensor, Normalize
from dinov2_custom.errors import command, small_recipe
from dinov2_custom.eval.neighbours import NEIGHBOURS
from dinov2_custom.plots import (
    average_neighbours,
    dino_loss,
    patch_feature_map,
    pca_colours,
    plot_loss_curve,
    plot_rows,
    read_metrics,
)
from dinov2_custom.quickstart.measure import Measurement, measure_run
from dinov2_custom.quickstart.photos import Tiling, cut_photos, open_photo
from dinov2_custom.train.train import main as train

DEFAULT_TILING = Tiling()
SHOWN = ("cat", "coffee", "motorcycle", "astronaut", "coins", "tissue")
PCA_STEP = 16
POOL_RADIUS = 2


def main(args: argparse.Namespace, tiling: Tiling = DEFAULT_TILING) -> int:
    """Run the quickstart; return 0, 1 if a run collapsed, or the exit code of a training that was stopped.

    Writes below ``args.output_dir``: ``tiles/``, ``seed_<n>/`` (a training run each), ``loss_curve.png``, ``pca.png``
    (both of the first seed) and ``quickstart.json``.

    Raises:
        DINOv2Error: the configuration is invalid, or scikit-image or matplotlib is missing; raised before any training.
    """
    out = Path(args.output_dir).expanduser().absolute()
    check_output_dir(str(out))
    load_run_config(args.config_file, args.opts, allow_unknown_keys=args.allow_unknown_keys, require_dataset=False)
    counts = cut_photos(out / "tiles", tiling)
    train_count, held_out_count = (sum(counts[part].values()) for part in ("train", "held_out"))
    print(f"tiles: {train_count:,} to train on, {held_out_count:,} held out, from {len(counts['train'])} photographs")

    results: dict[int, Measurement] = {}
    for seed in args.seeds:
        run = out / f"seed_{seed}"
        started = time.monotonic()
        code = train(training_args(args, run, out / "tiles", seed))
        if code:
            return code
        print(f"training: seed={seed} seconds={time.monotonic() - started:.0f}")
        rows = read_metrics(run / "training_metrics.json")
        results[seed], untrained, trained = measure_run(run, out / "tiles", dino_loss(rows[-1]))
        if seed == args.seeds[0]:
            plot_loss_curve(rows, out / "loss_curve.png", results[seed].num_prototypes)
            draw_features(run, tiling.size, untrained, trained, out / "pca.png")

    (out / "quickstart.json").write_text(json.dumps({seed: r._asdict() for seed, r in results.items()}, indent=1))
    for line in [*describe(results, held_out_count, len(counts["train"])), *describe_files(out, args.seeds[0])]:
        print(line)
    return int(any(result.collapse for result in results.values()))


def training_args(args: argparse.Namespace, run: Path, tiles: Path, seed: int) -> argparse.Namespace:
    """Return the arguments of the training command for one seed."""
    labelled = {"knn_train": tiles / "train", "knn_val": tiles / "held_out"}
    knn = [f"evaluation.online.{name}=LabelledFolder:root={folder}" for name, folder in labelled.items()]
    opts = [*knn, *args.opts, f"train.dataset_path={tiles / 'train'}", f"train.seed={seed}"]
    return argparse.Namespace(
        config_file=args.config_file,
        opts=opts,
        output_dir=str(run),
        no_resume=args.no_resume,
        eval_only=False,
        allow_unknown_keys=args.allow_unknown_keys,
    )


def describe(results: dict[int, Measurement], num_tiles: int, num_photos: int) -> list[str]:
    """Return the report, one line each: accuracies, gain, entropies, and a warning for every collapsed run."""
    lines = [f"kNN accuracy (k={NEIGHBOURS}) on {num_tiles:,} held-out tiles of {num_photos} photographs"]
    fields = {"raw pixels": "raw_pixels", "untrained network": "untrained", "trained teacher": "trained"}
    for label, field in fields.items():
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
    return [
        f"loss curve: {out / 'loss_curve.png'}",
        f"patch features: {out / 'pca.png'} (their first three principal components as red, green, blue)",
        f"training run: {out / f'seed_{seed}'}",
        f"next: your own images: {command('run/train/train.py')} {small_recipe('configs/small.yaml')} --output-dir out "
        "train.dataset_path=/my/images",
    ]


def draw_features(run: Path, window: int, untrained: nn.Module, trained: nn.Module, path: Path) -> None:
    """Draw photographs above their patch features before and after training, seen ``window`` pixels at a time."""
    normalize = Normalize(**load_run_config(str(run / "config.yaml")).data.normalize)
    photos = [open_photo(name) for name in SHOWN]
    images = [normalize(MaybeToTensor()(photo.convert("L").convert("RGB"))) for photo in photos]
    before, after = ([patch_feature_map(b, i, window, PCA_STEP) for i in images] for b in (untrained, trained))
    rows = {
        "photograph": [np.asarray(photo) for photo in photos],
        "untrained": pca_colours([average_neighbours(one, POOL_RADIUS) for one in before]),
        "trained": pca_colours([average_neighbours(one, POOL_RADIUS) for one in after]),
        "single patches": pca_colours(after),
    }
    side = 2 * POOL_RADIUS + 1
    title = f"Patch features, means of {side} x {side} patches; last row: the trained teacher's, patch by patch"
    plot_rows(rows, path, title)
