"""Runs on the stand-in with real values: on a "GPU" the engine computes what it computes on a CPU.

Run by ``test_cuda_host.py``.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.cuda_host.run import REPOSITORY
from tests.data.pictures import make_folder

PARTS = [f"{model}.{part}" for model in ("student", "teacher") for part in ("backbone", "dino_head")]
FP32 = [f"compute_precision.{part}.mixed_precision.param_dtype=fp32" for part in PARTS]


def losses(folder, options, on_gpu):
    command = [sys.executable, "-m", "tests.cuda_host.run", "--compute"] if on_gpu else [sys.executable]
    command += ["run/train/train.py", "--config-file", "configs/quickstart.yaml", "--output-dir", str(folder), *options]
    environment = {name: value for name, value in os.environ.items() if on_gpu or name != "LD_PRELOAD"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("device: cuda" in done.stderr + done.stdout) == on_gpu
    return [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("more", ["", "optim.accumulation_steps=2 train.centering=centering ibot.separate_head=true"])
def test_training_on_the_device_is_training_on_the_cpu(more, tmp_path):
    make_folder(tmp_path / "images", [f"{i}.png" for i in range(12)], 64, 64)
    options = [f"train.dataset_path=ImageFolder:root={tmp_path / 'images'}", "train.max_steps=4", "train.log_every=1"]
    options += ["train.batch_size_per_gpu=4", "train.num_workers=0", "optim.warmup_epochs=0", *FP32, *more.split()]
    on_cpu, on_gpu = (losses(tmp_path / str(where), options, where) for where in (False, True))
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        for name in ("total_loss", "grad_norm_backbone", "teacher_entropy"):
            assert gpu[name] == pytest.approx(cpu[name], rel=1e-3), name
