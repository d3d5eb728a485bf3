"""Two real processes (gloo): reduced gradients, and a run whose result does not depend on the number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov2_custom.parallel import GradientReducer, _grouped
from dinov2_custom.utils.weights import read_weights
from tests.train.batches import TINY
from tests.train.test_train import weights, write_images

REPOSITORY = Path(__file__).resolve().parents[1]


def test_buckets_hold_every_parameter_once_in_order():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (10, 300, 5, 5, 5)]
    parameters.append(nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    runs = list(_grouped(parameters, max_bytes=64))
    assert [[p.numel() for p in run] for run in runs] == [[10], [300], [5, 5, 5], [3]]


def test_one_process_needs_nothing():
    p = nn.Parameter(torch.ones(2))
    reducer = GradientReducer([p])
    reducer.arm()
    (p.sum() * 3).backward()
    reducer.finish()
    assert torch.equal(p.grad, torch.full((2,), 3.0))


def launch(processes: int, *command: str, timeout: float = 240) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command)
    options = {"env": env, "cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": timeout}
    done = subprocess.run([sys.executable, *command], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_two_processes_average_whatever_each_of_them_used(tmp_path):
    script = tmp_path / "reduce.py"
    script.write_text(
        """
import json, sys, torch
from torch import nn
from dinov2_custom import distributed
from dinov2_custom.parallel import GradientReducer
distributed.enable()
rank = distributed.get_global_rank()
both, one, none = (nn.Parameter(torch.ones(3)) for _ in range(3))
reducer = GradientReducer([both, one, none], bucket_mib=1e-6)
(both.sum() * 10).backward()            # accumulated before, not reduced yet
reducer.arm()
loss = (both.sum() * (rank + 1)) if rank else (both.sum() + one.sum() * 4)
loss.backward()
reducer.finish()
if rank == 0:
    json.dump([both.grad.tolist(), one.grad.tolist(), none.grad], open(sys.argv[1], "w"))
distributed.disable()
"""
    )
    launch(2, str(script), str(tmp_path / "out.json"))
    both, one, none = json.loads((tmp_path / "out.json").read_text())
    assert (both, one, none) == ([11.5] * 3, [2.0] * 3, None)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_one_and_two_processes_give_the_same_weights(tmp_path, centering):
    images = write_images(tmp_path / "images", 12)
    fp32 = [
        f"compute_precision.{model}.{part}.mixed_precision.param_dtype=fp32"
        for model in ("student", "teacher")
        for part in ("backbone", "dino_head")
    ]
    common = [
        "run/train/train.py", f"train.dataset_path={images}", *TINY, *fp32, f"train.centering={centering}",
        "train.num_workers=0", "train.OFFICIAL_EPOCH_LENGTH=10", "optim.epochs=1", "optim.warmup_epochs=0.3",
        "dino.koleo_neighbours=all", "student.layerscale=1",  # else features are so alike that rounding matters
    ]  # fmt: skip
    launch(1, *common, "train.batch_size_per_gpu=8", "--output-dir", str(tmp_path / "one"))
    done = launch(
        2, *common, "train.batch_size_per_gpu=4", "train.view_groups=4", "--output-dir", str(tmp_path / "two")
    )
    assert "world_size=2" in done.stdout
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = read_weights(tmp_path / "one" / "model_final")
    assert start["iteration"] == 9
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    rows = [json.loads(line) for line in (tmp_path / "two" / "training_metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 9]
