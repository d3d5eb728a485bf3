"""Train 300 steps on photographs with all, all compiled, and none of the lean options, and compare the loss curves.

The photographs are the quickstart's tiles (scikit-image ships them), the recipe is ``configs/quickstart.yaml`` with
drop path .1. ``python -m benchmarks.same_curve --write`` writes results/same_curve.md and docs/images/same_curve.png.
Needs the extra ``quickstart``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import add_write_option, core_seconds, describe, finish, table
from dinov2_custom.plots.figure import new_figure
from dinov2_custom.quickstart.photos import cut_photos

ROOT = Path(__file__).parents[1]
ALL = "train.lean=true train.view_groups=4 train.activation_checkpointing=selective"
NONE = "train.lean=false train.view_groups=1 train.activation_checkpointing=none"
VARIANTS = {"none": NONE, "all": ALL, "compiled": f"{ALL} train.compile=on"}  # compiled steps use constant shapes
TERMS = ("total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss")


def train(images: Path, out: Path, args, options: str, precision: str) -> list[dict]:
    """Return the rows of ``training_metrics.json``, one per step."""
    dtypes = [
        f"compute_precision.{model}.{part}.mixed_precision.param_dtype={precision}"
        for model in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    ]
    command = [
        sys.executable,
        "run/train/train.py",
        "--config-file",
        "configs/quickstart.yaml",
        "--output-dir",
        str(out),
    ]
    command += [f"train.dataset_path={images}", f"train.OFFICIAL_EPOCH_LENGTH={args.steps}", "optim.epochs=1"]
    command += ["optim.warmup_epochs=0.1", "student.drop_path_rate=0.1", "train.log_every=1", "train.num_workers=0"]
    command += [f"train.batch_size_per_gpu={args.batch_size}"]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(out.parent / "compiled")}  # start with an empty cache
    subprocess.run([*command, *dtypes, *options.split()], check=True, cwd=ROOT, env=env, capture_output=True)
    return [json.loads(line) for line in (out / "training_metrics.json").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    add_write_option(parser)
    args = parser.parse_args()
    curves, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "photos"
        cut_photos(images)
        for precision in args.precisions:
            for name, options in VARIANTS.items():
                out, before = Path(folder) / f"{precision}_{name}", core_seconds()
                curves[precision, name] = train(images / "train", out, args, options, precision)
                seconds[precision, name] = core_seconds() - before
                print(f"{precision} {name}: {seconds[precision, name]:.0f} s of one core", flush=True)
    report(curves, seconds, args)


def report(curves: dict[tuple[str, str], list[dict]], seconds: dict[tuple[str, str], float], args) -> None:
    """Print the page, and write it and the plot if asked to."""
    rows = []
    for precision in args.precisions:
        for term in TERMS:
            series = {name: [row[term] for row in curves[precision, name]] for name in VARIANTS}
            worst = (apart(series["none"], series[name]) for name in ("all", "compiled"))
            ends = (f"{values[-1]:.4f}" for values in series.values())
            rounding = "-"
            if precision != "fp32" and ("fp32", "none") in curves:
                rounding = f"{apart([row[term] for row in curves['fp32', 'none']], series['none']):.1e}"
            differences = (*(f"{one:.1e}" for one in worst), rounding)
            rows.append([precision, term, f"{series['none'][0]:.4f}", *ends, *differences])
    header = ["precision", "term", "first step", "last step, none", "all", "compiled"]
    header += ["largest difference from none, relative: all", "compiled", "of none from fp32's none"]
    times = ", ".join(f"{precision} {name} {seconds[precision, name]:.0f} s" for precision, name in curves)
    page = (
        "# The same loss curve with all optimisations and with none\n\n"
        f"{describe('benchmarks.same_curve')}\n"
        f"{args.steps} steps of {args.batch_size} images with `configs/quickstart.yaml`, tiles of photographs, "
        f"drop path .1. *all*: `{ALL}`. "
        "*compiled*: the same with `train.compile=on`, which also makes shapes constant. "
        f"*none*: `{NONE}`. Medians over 20 steps, as in `training_metrics.json`. In bf16 they round differently, "
        "and training amplifies any difference: the last column is what bf16 alone does. "
        f"Time of one core, compilation and start included: {times}.\n\n"
        f"{table(header, rows)}\nKoLeo passes through 0 in this run, so its relative difference says little.\n"
    )
    finish(page, "same_curve", args.write)
    if args.write:
        plot(curves, args.precisions, ROOT / "docs" / "images" / "same_curve.png")


def apart(expected: list[float], got: list[float]) -> float:
    """Return the largest |got - expected| / |expected| over the steps."""
    return max(abs(b - a) / max(abs(a), 1e-9) for a, b in zip(expected, got, strict=True))


def plot(curves: dict, precisions: list[str], path: Path) -> None:
    """Plot the total losses in one figure."""
    figure = new_figure(figsize=(4.5 * len(precisions), 3.2))
    for column, precision in enumerate(precisions):
        axes = figure.add_subplot(1, len(precisions), column + 1)
        styles = ({"linewidth": 4.5, "alpha": 0.35}, {"linewidth": 2}, {"linewidth": 1, "linestyle": "--"})
        for name, style in zip(VARIANTS, styles, strict=True):
            rows = curves[precision, name]
            axes.plot([row["iteration"] for row in rows], [row["total_loss"] for row in rows], label=name, **style)
        axes.set(title=precision, xlabel="iteration", ylabel="total loss")
        axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
