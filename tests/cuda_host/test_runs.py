"""Whole runs, and processes of several, on the stand-in of the CUDA runtime."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.cuda_host.run import REPOSITORY
from tests.data.pictures import make_folder
from tests.train.batches import TINY


@pytest.fixture
def images(tmp_path):
    make_folder(tmp_path / "images", [f"{i}.png" for i in range(12)], 64, 64)
    return tmp_path / "images"


def finished(command, env):
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def train(images, out, *options, compute=False):
    script = ["run/train/train.py", "--output-dir", str(out), f"train.dataset_path=ImageFolder:root={images}", *TINY]
    script += ["train.num_workers=0", "train.log_every=1", *options]
    return [sys.executable, *(["-m", "tests.cuda_host.run", "--compute"] if compute else []), *script]


def test_a_resumed_run_is_the_uninterrupted_one(preloaded, images, tmp_path):
    """3 + 3 steps equal 6, with real values."""
    options = ["train.max_steps=6", "checkpointing.period=3", "optim.warmup_epochs=0"]
    options += ["evaluation.online.every=2", "evaluation.online.images=6"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    finished(train(images, straight, *options, compute=True), preloaded)
    shutil.copytree(straight, resumed)
    for path in resumed.glob("model_*"):
        if path.name != "model_0000002":
            shutil.rmtree(path)
    done = finished(train(images, resumed, *options, compute=True), preloaded)
    assert "resumed from=" in done.stdout + done.stderr
    half, whole, again = (
        load_file(run / name / "rank_00000.safetensors")
        for run, name in ((straight, "model_0000002"), (straight, "model_final"), (resumed, "model_final"))
    )
    assert {float(value) for name, value in again.items() if name.startswith("optimizer.step.")} == {6.0}
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert max(float((half[name] - whole[name]).abs().max()) for name in half if name.startswith("student")) > 1e-4


@pytest.mark.parametrize("lean", ["true", "false"])
def test_drop_path_may_leave_no_sequence_of_a_group(preloaded, images, tmp_path, lean):
    """Each global crop is a group; one draw in six keeps neither of its two sequences."""
    precision = [f"compute_precision.{m}.backbone.mixed_precision.param_dtype=bf16" for m in ("student", "teacher")]
    options = ["train.view_groups=4", "train.batch_size_per_gpu=2", "student.drop_path_rate=0.4", f"train.lean={lean}"]
    options += ["train.max_steps=6", "train.max_nonfinite_steps=1000", *precision]
    finished(train(images, tmp_path / "run", *options), preloaded)


ONE_GPU_A_TASK = """
import torch
from dinov2_custom import distributed
from dinov2_custom.eval.setup import build_model_for_eval, get_autocast_dtype
from dinov2_custom.teacher import device_of_choice
from dinov2_custom.train import train
distributed._start_group = lambda world: None  # the other task is not there
made = []
train.do_train = lambda cfg, model, **_: made.append(model.device) or 0
distributed.enable()
assert (distributed.get_local_rank(), torch.cuda.device_count()) == (1, 1)
devices = [distributed.get_device(), device_of_choice("auto"), device_of_choice("cuda")]
assert {str(device) for device in devices} == {"cuda:0"}, devices
for device in devices:
    torch.zeros(1, device=device)
assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
import sys
assert train.main(train.get_args_parser().parse_args(sys.argv[1:])) == 0
assert str(made[0]) == "cuda:0", made
"""


def test_a_task_that_sees_its_own_gpu_only_takes_that(preloaded, images, tmp_path):
    """As the second task of ``srun --ntasks=2 --gpus-per-task=1``: local rank 1 and one GPU, number 0."""
    task = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    task |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}
    task |= {"SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
    arguments = train(images, tmp_path / "run")[2:]
    finished([sys.executable, "-c", ONE_GPU_A_TASK, *arguments], preloaded | task)


LEAST = """
from dinov2_custom import distributed
from dinov2_custom.train.memory import NCCL_BYTES, memory_for_steps
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import tiny_config
distributed.enable(set_cuda_current_device=False)
distributed.get_device = lambda: "cuda:0"
model = SSLMetaArch(tiny_config()).to("cuda:0")
parameters = sum(p.numel() for p in model.student.parameters())
print(memory_for_steps(model) + NCCL_BYTES + 4 * parameters)
distributed.barrier()
distributed.disable()
from dinov2_custom import entry
entry.leave(0)
"""


def test_the_least_memory_over_processes_decides_the_recomputation(preloaded):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sizes = (24 * 10**9, 16 * 10**9)
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", LEAST],
            env=preloaded | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_HOST_MEMORY": str(size)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, size in enumerate(sizes)
    ]
    ends = [job.communicate(timeout=600) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], ends
    found = [int(said.split()[-1]) for said, _ in ends]
    assert found[0] == found[1] and found[0] == pytest.approx(sizes[1], rel=0.01)


def test_features_are_computed_in_bf16_where_the_gpu_has_it(preloaded, images, tmp_path):
    finished(train(images, tmp_path / "run", "train.max_steps=1"), preloaded)
    command = ["run/embed.py", str(tmp_path / "run"), str(images), "--output-dir", str(tmp_path / "features")]
    finished([sys.executable, *command, "--num-workers", "0"], preloaded)
    assert json.loads((tmp_path / "features" / "embed.json").read_text())["precision"] == "bf16"
