"""Run the commands of the pages in order, on generated images and with a network of milliseconds per step.

``python -m tests.docs.run_commands`` takes three minutes of processor time, lists what it left out and why, and ends
with 1 if a command failed. ``.ci/run`` calls it. ``test_pages.py`` tests that every command can be parsed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tests.docs.pages import REPOSITORY, Shown, commands
from tests.train.batches import TINY

SHORT = ("train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=1", "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0")
SHRINK = {
    "run/train/train.py": (*TINY, *SHORT, "train.num_workers=0", "evaluation.eval_period_iterations=0"),
    "run/eval/linear.py": ("--epochs", "1", "--epoch-length", "2", "--batch-size", "4", "--num-workers", "0"),
    "run/eval/log_regression.py": ("--batch-size", "4", "--num-workers", "0"),
    "run/eval/knn.py": ("--nb_knn", "1", "--num-workers", "0"),
    "run/embed.py": ("--num-workers", "0", "--image-size", "32", "--output-dir", "features", "--overwrite"),
    "run/export/export.py": ("--image-size", "32", "--overwrite"),
    "run/plots/features.py": ("--num-images", "2", "--image-size", "32", "--num-points", "8"),
    "run/data/prepare.py": ("--workers", "1"),
    "run/data/verify.py": ("--workers", "1"),
    "run/train/plan.py": TINY,
}
RENAMED = (  # of absolute paths on a page, and of what depends on the length of the run
    (r"(?<![\w.:/])/(my|labelled|fast|path|data)/", r"\1/"),
    (r"(?<==)/(my|labelled|fast|path|data)/", r"\1/"),
    (r"https://\S+\.pth", "path/weights.pth"),
    (r"path/dinov2_\w+\.pth", "path/weights.pth"),
    (r"^weights\.pth$", "path/weights.pth"),
    (r"training_9999", "training_1"),
    (r"\{0+\.\.\d+\}", "{00000..00000}"),
)
LEFT_OUT = (  # (in the command, where it is run instead)
    ("--partition", "needs SLURM: tests/slurm"),
    ("--cluster", "needs SLURM: tests/slurm"),
    ("--nodes", "needs SLURM: tests/slurm"),
    ("run/quickstart.py", "minutes: tests/test_quickstart.py"),
    ("run/patches/apply.py", "needs a checkout of upstream: tests/patches"),
    ("run/decoder/", "needs labels: tests/decoder"),
    ("--forecast", "needs a longer run: tests/plots"),
    ("--push", "needs an account: tests/export"),
    ("twine", "a release: make package"),
    ("build", "a release: make package"),
    ("pytest", "tests"),
    ("upstream_run", "needs a run of upstream: tests/export"),
    ("benchmarks.", "minutes to hours: tests/benchmarks"),
    ("tests.", "minutes: tests/train"),
    ("venv", "an installation: .ci/run starts with one"),
    ("...", "a part of a command"),
    ("dinov2/", "a command of upstream"),
    ("out/vits", "needs two runs: tests/plots"),
    ("Tar:path=shards", "shards of the reader: tests/verify"),
    ("vitg14_pretrain", "weights with SwiGLU: tests/test_teacher.py"),
)


def reason_to_leave_out(shown: Shown) -> str:
    program, *rest = shown.words
    if program != "python":
        return f"not a Python command: {program}"
    if len(rest) - rest.count("-m") < 2 or rest == ["-m", "dinov2_custom", "train"]:
        return "a name, not a command"
    if rest[0] == "run/train/train.py" and not any(word.startswith("train.dataset_path=") for word in rest):
        return "a part of a command"
    return next((where for part, where in LEFT_OUT if any(part in word for word in shown.words)), "")


def make_inputs(folder: Path) -> None:
    """Create what the pages call /my/images and so on, and links to the checkout's folders."""
    for name in ("run", "configs", "benchmarks", "docs"):
        (folder / name).symlink_to(REPOSITORY / name)
    draws = np.random.default_rng(0)
    names = []
    for part in ("my/images", "labelled/train", "labelled/val"):
        for group in ("site_a", "site_b"):
            (folder / part / group).mkdir(parents=True)
            for index in range(6):
                pixels = draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                path = folder / part / group / f"{index}.png"
                Image.fromarray(pixels).save(path)
                names += [path] if part == "my/images" else []
    (folder / "my" / "files.txt").write_text("".join(f"{path}\n" for path in names))
    rows = "".join(f"{path.relative_to(folder / 'my' / 'images')}\n" for path in names)
    (folder / "my" / "files.csv").write_text("image\n" + rows)
    make_shards(folder / "my", names)
    make_labels(folder / "my")


def make_labels(folder: Path) -> None:
    """Write a dataset definition whose images are labelled by masks."""
    for kind, pixels in (("images", np.zeros((40, 40, 3), np.uint8)), ("masks", np.zeros((40, 40), np.uint8))):
        (folder / "scenes" / kind).mkdir(parents=True)
        for index in range(6):
            Image.fromarray(pixels).save(folder / "scenes" / kind / f"{index}.png")
    source = "{images: scenes/images, masks: scenes/masks}"
    (folder / "data.yaml").write_text(f"classes: [background, cell]\ntrain: {source}\n")


def make_shards(folder: Path, names: list[Path]) -> None:
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "shards").mkdir()
    (folder / "hf_dataset" / "data").mkdir(parents=True)
    for place in ("shards/0.tar", "shard-00000.tar"):
        with tarfile.open(folder / place, "w") as tar:
            for path in names:
                tar.add(path, f"{path.parent.name}/{path.name}")
    table = pa.table({"image": [{"bytes": path.read_bytes(), "path": path.name} for path in names]})
    for place in ("hf_dataset/data/0.parquet", "train-00000-of-00042.parquet"):
        pq.write_table(table, folder / place)


def runnable(shown: Shown) -> list[str]:
    """Return the command with this interpreter, the paths of the generated inputs and fewer steps."""
    words = list(shown.words[1:])
    for pattern, value in RENAMED:
        words = [re.sub(pattern, value, word) for word in words]
    more = SHRINK.get(words[0], ())
    if words[0] == "run/train/train.py" and "--output-dir" not in words:
        more = ("--output-dir", "out", *more)
    return [sys.executable, *words, *more]


def main() -> int:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "offline"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    done, failed, left_out = set(), [], Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_inputs(folder)

        def run(command: list[str]) -> subprocess.CompletedProcess:
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 600}
            return subprocess.run(command, cwd=folder, env=environment, **options)

        first = Shown("", "python run/train/train.py --output-dir out train.dataset_path=/my/images".split(), True)
        weights = Shown("", "python run/export/export.py out --to torch --output /path/weights.pth".split(), True)
        for shown in (first, weights, *commands()):
            if reason := reason_to_leave_out(shown):
                left_out[reason] += 1
                continue
            command = runnable(shown)
            if " ".join(command) in done:
                continue
            done.add(" ".join(command))
            if command[1] == "run/train/train.py":
                out = folder / command[command.index("--output-dir") + 1]
                if out.exists() and "--no-resume" not in command:
                    command.append("--no-resume")
            started = time.monotonic()
            ended = run(command)
            result = "FAILED" if ended.returncode else "ok"
            print(f"{result:6} {time.monotonic() - started:4.0f} s  {shown}", flush=True)
            if ended.returncode:
                failed.append(shown)
                print(ended.stdout[-3000:], flush=True)
    for reason, count in left_out.most_common():
        print(f"left out: {count} ({reason})")
    print(f"{len(done) - len(failed)} commands ran, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
