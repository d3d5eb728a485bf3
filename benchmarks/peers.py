"""Compare ViT-S/14 training with lightly-train, each with its own command, process and default precision, in turn.

Both get the same files, crops, batch, prototypes, registers and centering; the page lists the remaining differences. A
step's duration is what each product writes to its own metrics, including waits for data. lightly-train's usage events
are disabled. Accuracy is not compared. ``python -m benchmarks.peers --lightly-python VENV/bin/python --write`` writes
results/peers.md; lightly-train must be installed for that Python.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import add_write_option, describe, finish, table
from benchmarks.photographs import encoded

BATCH = 8
OURS = (
    "student.num_register_tokens=4 train.centering=centering dino.head_n_prototypes=65536 train.num_workers=0 "
    f"train.batch_size_per_gpu={BATCH} train.log_every=1 optim.warmup_epochs=0"
)
PARTS = ("student.backbone", "student.dino_head", "student.ibot_head")
PARTS += tuple(part.replace("student", "teacher") for part in PARTS)
FP32 = " ".join(f"compute_precision.{part}.mixed_precision.param_dtype=fp32" for part in PARTS)
THEIRS = (
    f"model=dinov2/vits14-notpretrained method=dinov2 batch_size={BATCH} num_workers=0 accelerator=cpu devices=1 "
    "epochs=1 trainer_args.log_every_n_steps=1"
)
REPOSITORY = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """Seconds of each measured step, and the process's peak resident memory in GB."""

    seconds: list[float]
    peak_gb: float


def their_seconds(lines: Iterable[str]) -> list[float]:
    """Return seconds per step from lightly-train's metrics.jsonl, including the wait for the batch."""
    rows = [row for row in map(json.loads, lines) if "profiling/batch_time" in row]
    return [row["profiling/batch_time"] + row.get("profiling/data_time", 0.0) for row in rows]


def our_seconds(lines: Iterable[str]) -> list[float]:
    """Return seconds per step from our training_metrics.json of at most 20 steps, whose rows are running means."""
    sums = [(i + 1) * json.loads(line)["iter_time"] for i, line in enumerate(lines)]
    return [after - before for before, after in zip([0.0, *sums], sums, strict=False)]


def run(command: list[str], log: Path) -> float:
    """Run ``command`` to completion and return its peak resident GB; its output goes to ``log``."""
    env = {**os.environ, "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=REPOSITORY)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return usage.ru_maxrss * 1024 / 1e9


def lightly_run(python: Path, images: Path, out: Path) -> Run:
    command = [str(python.with_name("lightly-train")), "pretrain", f"out={out}", f"data={images}", *THEIRS.split()]
    peak = run(command, out.with_suffix(".log"))
    return Run(their_seconds((out / "metrics.jsonl").read_text().splitlines())[1:-1], peak)


def our_run(images: Path, out: Path, steps: int, more: str) -> Run:
    command = [sys.executable, "run/train/train.py", "--config-file", "configs/vits.yaml", "--output-dir", str(out)]
    command += [f"train.dataset_path={images}", f"train.max_steps={steps}", *OURS.split(), *more.split()]
    peak = run(command, out.with_suffix(".log"))
    return Run(our_seconds((out / "training_metrics.json").read_text().splitlines())[1:-1], peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lightly-python", type=Path, required=True, help="Python that lightly-train is installed for")
    parser.add_argument("--steps", type=int, default=7, choices=range(3, 21), metavar="3..20", help="of each run")
    parser.add_argument("--turns", type=int, default=2)
    add_write_option(parser)
    args = parser.parse_args()
    runs: dict[str, list[Run]] = {"lightly-train, fp32": [], "ours, bf16": [], "ours, fp32": []}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        for i, data in enumerate(encoded(500, 375, "JPEG", BATCH * args.steps)):
            (images / f"{i:03d}.jpg").write_bytes(data)
        for turn in range(args.turns):
            done = (
                lightly_run(args.lightly_python, images, Path(folder, f"lightly_{turn}")),
                our_run(images, Path(folder, f"bf16_{turn}"), args.steps, ""),
                our_run(images, Path(folder, f"fp32_{turn}"), args.steps, FP32),
            )
            for found, one in zip(runs.values(), done, strict=True):
                found.append(one)
    text = page(runs, their_versions(args.lightly_python)).replace(str(args.lightly_python), "VENV/bin/python")
    finish(text, "peers", args.write)


def their_versions(python: Path) -> str:
    code = "from importlib.metadata import version as v; print(*(f'{n}={v(n)}' for n in ('lightly-train', 'torch')))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def page(runs: dict[str, list[Run]], versions: str) -> str:
    """Return the page; the first of ``runs`` is the baseline."""
    rows, medians = [], []
    for name, turns in runs.items():
        seconds = [second for one in turns for second in one.seconds]
        medians.append(statistics.median(seconds))
        rows.append(
            [
                name,
                f"{medians[-1]:.2f}",
                f"{min(seconds):.2f} .. {max(seconds):.2f}",
                f"{BATCH / medians[-1]:.2f}",
                f"{medians[0] / medians[-1]:.2f}",
                f"{max(one.peak_gb for one in turns):.2f}",
            ]
        )
    header = ["", "median s/step", "range", "images/s", "times as fast", "peak resident GB"]
    counted = len(next(iter(runs.values()))[0].seconds)
    return (
        "# Training beside lightly-train\n\n"
        f"{describe('benchmarks.peers')}* lightly-train's environment: {versions}\n\n"
        f"ViT-S/14 from scratch, 4 registers, 2 x 224 + 8 x 98 px of 500 x 375 JPEG files, batch {BATCH}, 65,536 "
        "prototypes, one head for both losses, centering by softmax, drop-path 0.1, no loader processes, one process "
        f"on all cores. {len(next(iter(runs.values())))} runs of each in turn; of each {counted} steps count: not the "
        "first, and not the last, in which a checkpoint is written.\n\n"
        f"{table(header, rows)}\n"
        f"Each computes in its default precision (`lightly-train pretrain {THEIRS}`; "
        f"`run/train/train.py --config-file configs/vits.yaml {OURS}`); the last row is ours in theirs.\n\n"
        "What differs beyond the code of a step: lightly-train scales crops with OpenCV's area filter, we with an "
        "antialiased bicubic one as Pillow; it draws masks in the training step, we where the batch is made; and "
        "schedules, which cost nothing. Each runs on its environment's torch.\n"
    )


if __name__ == "__main__":
    main()
