"""Kill a run with signal 9 at random moments, repeatedly, and compare its weights with an uninterrupted run's.

    python -m tests.train.kill_and_resume --kills 50 --seed 0

Checkpoints are written at every second iteration, so many kills occur during a save. Prints a markdown table of the
kills, and exits with 1 when a single bit differs.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from dinov2_custom.utils.run_folder import is_complete
from tests.train.test_interrupted import start
from tests.train.test_train import rows, weights, write_images

TOTAL = 400


def survive(images: Path, out: Path, kills: int, rng: random.Random, total: int = TOTAL) -> list[dict]:
    """Start, kill and restart until the run completes; return one record per kill."""
    records: list[dict] = []
    while True:
        process = start(images, out, total)
        if len(records) < kills:
            progress = out / "last_checkpoint"
            before = progress.read_text() if progress.exists() else ""
            while process.poll() is None and (progress.read_text() if progress.exists() else "") == before:
                time.sleep(0.005)  # past the previous progress: any moment will do
            time.sleep(rng.uniform(0, 3.0 if len(records) % 5 == 4 else 0.2))
        if process.poll() is None and len(records) < kills:
            torn = unfinished(out)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            written = rows(out)[-1:] if (out / "training_metrics.json").exists() else []
            records.append({"last_row": written[0]["iteration"] if written else None, "save_interrupted": bool(torn)})
            continue
        if process.wait() != 0:
            raise SystemExit(f"the run failed: see {out}.log")
        return records


def unfinished(out: Path) -> bool:
    """Return whether a checkpoint is being written."""
    folders = [p for p in out.glob("model_*") if p.is_dir()]
    return any(not is_complete(p) for p in folders) or any(out.glob("*.tmp"))


def differing(a: Path, b: Path) -> list[str]:
    """Return the names of tensors that are not equal bit for bit."""
    first, second = weights(a), weights(b)
    return [name for name in first if not torch.equal(first[name], second[name])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, total = random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "images", 12)
        whole = Path(folder) / "whole"
        if start(images, whole, TOTAL).wait():
            raise SystemExit((Path(folder) / "whole.log").read_text())
        print("| run | kills | of them during a save | tensors that differ |\n|---|---|---|---|")
        for run in range(1000):
            left = args.kills - total["kills"]
            if left <= 0:
                break
            out = Path(folder) / f"run{run}"
            records = survive(images, out, left, rng)
            wrong = differing(whole, out)
            saves = sum(record["save_interrupted"] for record in records)
            print(f"| {run} | {len(records)} | {saves} | {len(wrong)} |", flush=True)
            total.update(kills=len(records), saves=saves, wrong=len(wrong))
    print(f"| all | {total['kills']} | {total['saves']} | {total['wrong']} |")
    return 1 if total["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
