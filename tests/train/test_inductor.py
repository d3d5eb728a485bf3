"""The real compiler: a whole run through the training script. The other tests of compiling use stand-ins for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.batches import TINY
from tests.train.test_train import write_images

REPOSITORY = Path(__file__).resolve().parents[2]
FP32 = [
    f"compute_precision.{side}.{part}.mixed_precision.param_dtype=fp32"
    for side in ("student", "teacher")
    for part in ("backbone", "dino_head", "ibot_head")
]


def test_a_compiled_run_learns_the_same_and_compiles_in_its_first_step_only(tmp_path):
    """Use a separate process for each run, as compiler settings are per process."""
    images = write_images(tmp_path / "images", 12)
    rows, logs = {}, {}
    for setting in ("off", "on"):
        out = tmp_path / setting
        command = [
            sys.executable, "run/train/train.py", f"train.dataset_path={images}", *TINY, *FP32, "train.num_workers=0",
            "train.OFFICIAL_EPOCH_LENGTH=6", "optim.epochs=1", "optim.warmup_epochs=0.3", "train.log_every=1",
            "student.drop_path_rate=0.3", "dino.koleo_loss_weight=0", f"train.compile={setting}",
            "--output-dir", str(out),
        ]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TORCH_LOGS": "recompiles"}
        env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "compiled")
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 600}
        done = subprocess.run(command, cwd=REPOSITORY, env=env, **options)
        assert done.returncode == 0, done.stdout
        logs[setting] = done.stdout
        rows[setting] = [json.loads(line) for line in (out / "training_metrics.json").read_text().splitlines()]
    if "continuing without it" in logs["on"]:
        pytest.skip("needs a C++ compiler")
    assert "the first batch took" in logs["on"] and "the first batch took" not in logs["off"]
    first_steps, others = logs["on"].split("Training  [1/6]")
    assert "Recompiling function" in first_steps and "Recompiling function" not in others
    assert len(rows["on"]) == len(rows["off"]) == 6
    for one, other in zip(rows["off"], rows["on"], strict=True):
        for name in (name for name in one if name.endswith("_loss")):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
