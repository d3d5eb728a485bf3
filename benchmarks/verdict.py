"""Count how often prepared runs get the right verdict before a quarter of their length.

``python -m benchmarks.verdict --seeds 20 --write`` trains, for each seed, good runs and some that fail in known ways,
on grey tiles of photographs (as in the quickstart, smaller). Three of them continue the weights of one good run of
1,000 iterations. Runs that fail end after a quarter, or when ``train.on_collapse: stop`` ends them;
``evaluation.online`` measures kNN on the tiles held out. The same command resumes: runs with a ``rows.json`` are not
repeated, only their rows are read again. About 150 CPU seconds a seed. Writes results/verdict.md. Needs the extra
``quickstart``.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.machine import add_write_option, describe, finish, table
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.errors import COLLAPSED, stopped_by
from dinov2_custom.logging import METRICS_FILE, read_rows
from dinov2_custom.logging.sinks import JsonLines
from dinov2_custom.quickstart.photos import Tiling, cut_photos
from dinov2_custom.train import get_args_parser
from dinov2_custom.train import main as train
from dinov2_custom.train.health import EXPLODING, SINGLE, UNIFORM, WORSE, LearningAlarm, flat_dino_loss
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

ROOT = Path(__file__).parents[1]
DONE = "rows.json"
TOTAL = 200
QUARTER = TOTAL // 4
TILING = Tiling(size=48, train=40, held_out=60)
START, START_LENGTH = "start", 5 * TOTAL  # a good run with seed 0, whose weights others continue
COMMON = (
    "student.patch_size=8",
    "train.batch_size_per_gpu=32",
    "crops.local_crops_number=4",
    "train.num_workers=0",
    f"train.max_steps={TOTAL}",
    "train.log_every=1",
    "optim.warmup_epochs=0.5",
    "teacher.momentum_teacher=0.95",
    "train.on_collapse=stop",
)


class Kind(NamedTuple):
    """A prepared run: ``expected`` verdict, or "" for a good one; ``options`` beside the common ones."""

    expected: str
    options: tuple[str, ...] = ()
    evaluated: int = 0  # iterations from one evaluation to the next
    continues: bool = False  # starts from the teacher of START


RUNS = {
    "good": Kind("", evaluated=10),
    "learning rate x 30": Kind(EXPLODING, ("optim.base_lr=0.18",)),
    "teacher temperature 1": Kind(UNIFORM, ("teacher.teacher_temp=1.0", "teacher.warmup_teacher_temp=1.0")),
    "one prototype: centering, temperature 0.01": Kind(
        SINGLE,
        (
            "train.centering=centering",
            "dino.koleo_loss_weight=0",
            "teacher.teacher_temp=0.01",
            "teacher.warmup_teacher_temp=0.01",
        ),
    ),
    "trained weights, learning rate x 5": Kind(
        WORSE,
        ("optim.base_lr=0.03", "optim.warmup_epochs=0.05", "train.on_collapse=warn"),
        evaluated=5,
        continues=True,
    ),
    "trained weights, learning rate / 4": Kind("", ("optim.base_lr=0.0015",), evaluated=10, continues=True),
    "trained weights, learning rate x 10": Kind(
        WORSE,
        ("optim.base_lr=0.06", "optim.warmup_epochs=0.05", "train.on_collapse=warn"),
        evaluated=5,
        continues=True,
    ),
    # few prototypes at first, as above
    "centering": Kind("", ("train.centering=centering", "train.on_collapse=warn"), evaluated=10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/verdict"), help="tiles and runs")
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=70, help="thresholds were chosen on smaller seeds")
    parser.add_argument("--only", nargs="+", default=list(RUNS), help="names of prepared runs")
    parser.add_argument("--read", action="store_true", help="train nothing: count the runs that are there")
    parser.add_argument("--record", type=Path, help="also write the rows of all runs to this file, for tests")
    add_write_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.work.absolute()
    cut_photos(work / "tiles", TILING)
    results: dict[str, list[dict]] = {name: [] for name in args.only}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for seed in seeds:
        for name in args.only:
            if args.read and not (run_of(name, work, seed) / DONE).is_file():
                continue
            results[name].append(result := judged(name, work, seed))
            print(seed, name, result, flush=True)
    if args.record:
        args.record.write_text(json.dumps({name: [recorded(name, work, seed) for seed in seeds] for name in args.only}))
    page = (
        "# Verdicts on prepared runs\n\n"
        f"{describe('benchmarks.verdict')}\n"
        f"Runs of {TOTAL} iterations on {len(list((work / 'tiles' / 'train').rglob('*.png'))):,} grey tiles of "
        f"sixteen photographs, seeds {seeds[0]} to {seeds[-1]}. *right*: the expected verdict comes before a quarter "
        "of the run; for the good run: no verdict at all until its end. *first*: no other verdict comes before it. "
        "*kNN*: k = 20, tiles held out, at the start and at the latest evaluation before the first verdict, mean over "
        "seeds. "
        "Thresholds, runs and the meaning of *right* were chosen while looking at smaller seeds, those of "
        "single_prototype at seeds up to 109, so only further ones are a test.\n\n"
        f"{table(HEADER, [summary(name, found) for name, found in results.items()])}\n"
    )
    finish(page, "verdict", args.write)


HEADER = [
    "run",
    "expected verdict",
    "seeds",
    "right",
    "first",
    "iteration of the first verdict",
    "other verdicts",
    "kNN",
    "CPU s a run",
]


def run_of(name: str, work: Path, seed: int) -> Path:
    return work / f"{list(RUNS).index(name)}_{seed}"


def judged(name: str, work: Path, seed: int) -> dict[str, Any]:
    """Return the first verdict of one prepared run with its iteration; train it first, unless that is done."""
    kind, run = RUNS[name], run_of(name, work, seed)
    if not (run / DONE).is_file():
        (run / DONE).write_text(json.dumps(trained(kind, run, work, seed)))
    done = json.loads((run / DONE).read_text())
    rows, model = done["rows"], SSLMetaArch(load_run_config(str(run / "config.yaml")))
    flat = flat_dino_loss(model)
    alarm = LearningAlarm(model.num_prototypes, flat, lambda iteration: TOTAL, trained_start=kind.continues)
    calls = [(row["iteration"], called) for row in rows for called in alarm.check(row, TOTAL)]
    at, first = calls[0] if calls else (None, "")
    evaluated = [row for row in rows if "eval_knn" in row and (at is None or row["iteration"] <= at)]
    result = {"first": first, "at": at, "all": calls, "seconds": done["seconds"]}
    if evaluated:
        result |= {"start_knn": evaluated[0]["start_knn"], "knn": evaluated[-1]["eval_knn"]}
    return result


def start_weights(work: Path) -> Path:
    """Return the teacher that other runs continue; train it first, unless that is done."""
    run = work / START
    if not (run / DONE).is_file():
        kind = Kind("", (f"train.max_steps={START_LENGTH}",), evaluated=START_LENGTH // 10)
        (run / DONE).write_text(json.dumps(trained(kind, run, work, seed=0)))
    return run / "eval" / f"training_{START_LENGTH - 1}" / "teacher_checkpoint.pth"


def trained(kind: Kind, run: Path, work: Path, seed: int) -> dict[str, Any]:
    """Train one prepared run; return its rows and the CPU seconds."""
    options = [f"train.dataset_path={work / 'tiles' / 'train'}", f"train.seed={seed}", *COMMON, *kind.options]
    if kind.evaluated:
        options += [f"evaluation.online.every={kind.evaluated}", "evaluation.online.images=64"]
        options += [f"evaluation.online.{key}=LabelledFolder:root={work / 'tiles' / part}" for key, part in KNN_DATA]
    if kind.continues:
        options.append(f"student.pretrained_weights={start_weights(work)}")
    began = time.process_time()
    config = ["--config-file", str(ROOT / "configs" / "quickstart.yaml"), "--output-dir", str(run), "--no-resume"]
    with mock.patch.object(JsonLines, "log", log_until_a_quarter if kind.expected else JsonLines.log):
        code = train(get_args_parser().parse_args([*config, *options]))
    if code not in (0, COLLAPSED, stopped_by(signal.SIGTERM)):
        raise SystemExit(code)
    seconds = time.process_time() - began
    return {"rows": read_rows(run / METRICS_FILE), "seconds": seconds}


def log_until_a_quarter(sink: JsonLines, step: int, row: dict[str, float], log=JsonLines.log) -> None:
    log(sink, step, row)
    if step == QUARTER:
        signal.raise_signal(signal.SIGTERM)


def recorded(name: str, work: Path, seed: int) -> dict[str, list[float | None]]:
    """Return the rows of a finished run as columns of the values that verdicts depend on, with four digits."""
    rows = json.loads((run_of(name, work, seed) / DONE).read_text())["rows"]
    names = [key for key in dict.fromkeys(key for row in rows for key in row) if key in READ or key.startswith("grad_")]
    return {
        key: [None if (v := row.get(key)) is None else v if isinstance(v, int) else float(f"{v:.4g}") for row in rows]
        for key in names
    }


def is_right(name: str, result: dict[str, Any]) -> bool:
    expected = RUNS[name].expected
    early = [called for at, called in result["all"] if at <= QUARTER]
    return expected in early if expected else not result["all"]


def summary(name: str, results: list[dict[str, Any]]) -> list[str]:
    """Return the row of one prepared run in the table."""
    at = [result["at"] for result in results if result["at"] is not None]
    others = Counter(called for result in results for _, called in result["all"] if called != RUNS[name].expected)
    knn = [fmean(result.get(key, math.nan) for result in results) for key in KNN]
    return [
        name,
        RUNS[name].expected or "none",
        str(len(results)),
        str(sum(is_right(name, result) for result in results)),
        str(sum(result["first"] == RUNS[name].expected for result in results)),
        f"{min(at)} to {max(at)}" if at else "",
        ", ".join(f"{count} {kind}" for kind, count in others.items()),
        "" if math.isnan(knn[0]) else f"{knn[0]:.3f}, {knn[1]:.3f}",
        f"{fmean(result['seconds'] for result in results):.0f}",
    ]


READ = {
    "iteration", "current_batch_size", "dino_local_crops_loss", "dino_global_crops_loss", "teacher_entropy",
    "prototype_entropy", "rankme", "weight_norm_backbone", "skipped_steps", "eval_knn", "start_knn",
    "knn_images",
}  # fmt: skip
KNN = ("start_knn", "knn")
KNN_DATA = (("knn_train", "train"), ("knn_val", "held_out"))

if __name__ == "__main__":
    main()
