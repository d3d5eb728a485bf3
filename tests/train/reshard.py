"""Stop a run, resume it with other processes or another sharding, and compare with an uninterrupted run.

    python -m tests.train.reshard

Prints a markdown table: with the largest difference of a weight for each chain of settings. Exits with 1 when one is
above 1e-5. Losses are not compared: their rows are medians over a window that restarts.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.processes import launch
from tests.test_parallel import compare, tiny_run
from tests.train.test_train import write_images

STEPS = 12
PERIOD = 4
TOLERANCE = 1e-5


class Setting(NamedTuple):
    """How one part of a run composes its batch of 8."""

    processes: int
    strategy: str = "NO_SHARD"
    accumulated: int = 1
    workers: int = 0

    def __str__(self) -> str:
        kind = {"NO_SHARD": "DDP"}.get(self.strategy, f"FSDP2 {self.strategy}") if self.processes > 1 else ""
        extra = [f"{self.accumulated} accumulated"] if self.accumulated > 1 else []
        extra += [f"{self.workers} workers"] if self.workers else []
        return " ".join([f"{self.processes}", *([kind] if kind else []), *extra])


ALONE = Setting(1)
CHAINS = [
    (ALONE, ALONE, ALONE),
    (ALONE, Setting(1, workers=2), ALONE),
    (ALONE, Setting(2), ALONE),
    (ALONE, Setting(2, "SHARD_GRAD_OP"), ALONE),
    (Setting(2), Setting(2, "FULL_SHARD"), Setting(2)),
    (Setting(2, "FULL_SHARD"), Setting(4, "SHARD_GRAD_OP"), Setting(2)),
    (Setting(4, "FULL_SHARD"), ALONE, Setting(2, "SHARD_GRAD_OP")),
    (ALONE, Setting(1, accumulated=2), Setting(2, "SHARD_GRAD_OP", accumulated=2)),
]


def train(images: Path, out: Path, setting: Setting) -> None:
    """Start or resume a run in ``out``, and complete it."""
    launch(
        setting.processes,
        *tiny_run(
            images,
            f"train.OFFICIAL_EPOCH_LENGTH={STEPS}",
            f"checkpointing.period={PERIOD}",
            "optim.global_batch=8",
            "train.batch_size_per_gpu=8",  # at most
            f"optim.accumulation_steps={setting.accumulated}",
            f"train.num_workers={setting.workers}",
            strategy=setting.strategy,
        ),
        "--output-dir",
        str(out),
    )


def forget_after(out: Path, iteration: int) -> None:
    """Put ``out`` into the state after a kill right after the checkpoint of ``iteration``."""
    for path in out.glob("model_*"):
        if path.name != f"model_{iteration:07d}":
            shutil.rmtree(path)


def go_through(images: Path, out: Path, chain: tuple[Setting, ...], whole: Path) -> None:
    """Run ``PERIOD`` steps with each setting of ``chain``, the last one to the end; ``whole`` is the run of ALONE."""
    for number, setting in enumerate(chain, start=1):
        if number == 1 and setting == ALONE:
            shutil.copytree(whole, out)
        else:
            train(images, out, setting)
        if number < len(chain):
            forget_after(out, number * PERIOD - 1)


def marker(out: Path, name: str) -> dict:
    return json.loads((out / name / "checkpoint.json").read_text())


def main() -> int:
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        images, whole = write_images(Path(folder) / "images", 12), Path(folder) / "whole"
        train(images, whole, ALONE)
        print(f"| steps 1-{PERIOD} | then | then | weights |\n|---|---|---|---|")
        for number, chain in enumerate(CHAINS):
            out = Path(folder) / str(number)
            go_through(images, out, chain, whole)
            apart, _ = compare(whole, out)
            print(f"| {' | '.join(map(str, chain))} | {apart:.1e} |", flush=True)
            worst = max(worst, apart)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
