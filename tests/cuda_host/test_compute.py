"""On the stand-in with real values, training, evaluations and features on a "GPU" equal those on the CPU."""

import json
import os
import subprocess
import sys
from random import SystemRandom

import numpy as np
import pytest

from tests.cuda_host.run import REPOSITORY
from tests.data.pictures import make_folder
from tests.eval.test_setup import make_run
from tests.eval.test_two_processes import datasets, overlapping_classes

ON_CPU, ON_GPU = [sys.executable], [sys.executable, "-m", "tests.cuda_host.run", "--compute"]
PARTS = [f"{model}.{part}" for model in ("student", "teacher") for part in ("backbone", "dino_head")]


def in_precision(name):
    return [f"compute_precision.{part}.mixed_precision.param_dtype={name}" for part in PARTS]


def start(python, *command, **variables):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | variables
    command = [*python, *map(str, command)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(*processes):
    """Wait for the processes; return the output of the first one."""
    printed = [process.communicate(timeout=600)[0] for process in processes]
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text
    return printed[0]


def run(python, *command):
    return end(start(python, *command))


@pytest.fixture
def dataset(tmp_path, preloaded):
    make_folder(tmp_path / "images", [f"{i}.png" for i in range(12)], 64, 64)
    return f"train.dataset_path=ImageFolder:root={tmp_path / 'images'}"


def train(dataset, folder, *options, steps=3):
    return [
        *("run/train/train.py", "--config-file", "configs/quickstart.yaml", "--output-dir", folder, dataset),
        *("train.log_every=1", f"train.max_steps={steps}", "train.batch_size_per_gpu=4", "train.num_workers=0"),
        *("optim.warmup_epochs=0", *in_precision("fp32"), *options),
    ]


def rows(folder):
    lines = [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "time" not in name} for line in lines]


def assert_alike(on_cpu, on_gpu, rel=1e-3):
    for cpu, gpu in zip(rows(on_cpu), rows(on_gpu), strict=True):
        for name in ("total_loss", "grad_norm_backbone", "teacher_entropy"):
            assert gpu[name] == pytest.approx(cpu[name], rel=rel), name


@pytest.mark.parametrize("more", ["", "optim.accumulation_steps=2 train.centering=centering ibot.separate_head=true"])
def test_training_on_the_device_is_training_on_the_cpu(more, dataset, tmp_path):
    assert "device: cpu" in run(ON_CPU, *train(dataset, tmp_path / "cpu", *more.split(), steps=4))
    assert "device: cuda" in run(ON_GPU, *train(dataset, tmp_path / "gpu", *more.split(), steps=4))
    assert_alike(tmp_path / "cpu", tmp_path / "gpu")


def test_two_processes_with_one_visible_gpu_each(dataset, tmp_path):
    """As ``srun --ntasks=2 --gpus-per-task=1`` starts them: one GPU each, which both see as number 0."""
    options = ["train.batch_size_per_gpu=2"]
    for python, folder in ((ON_CPU, "cpu"), (ON_GPU, "gpu")):
        command = train(dataset, tmp_path / folder, *options)
        job = str(SystemRandom().randrange(10**6))  # the port follows from it
        visible = {"CUDA_VISIBLE_DEVICES": ""} if folder == "cpu" else {}
        end(*(start(python, *command, **slurm_task(rank, job) | visible) for rank in (1, 0)))
    assert_alike(tmp_path / "cpu", tmp_path / "gpu")
    assert "world_size=2" in (tmp_path / "gpu" / "logs" / "log.txt").read_text()


def slurm_task(rank, job):
    task = {"STEP_ID": 0, "PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": 2, "STEP_NUM_TASKS": 2, "JOB_ID": job}
    task |= {"STEP_NODELIST": "localhost", "STEP_TASKS_PER_NODE": "2"}
    return {f"SLURM_{name}": str(value) for name, value in task.items()} | {"CUDA_VISIBLE_DEVICES": str(rank)}


def test_evaluations_and_features_are_those_of_the_cpu(tmp_path, preloaded):
    _, _, weights = make_run(tmp_path / "run", "student.layerscale=1.0")
    overlapping_classes(tmp_path / "train", count=9, seed=0)
    overlapping_classes(tmp_path / "val", count=7, seed=1)
    small = ["--num-workers=0", "--resize-size=16", "--crop-size=16", "--pretrained-weights", weights]
    small += datasets(tmp_path)
    knn = ["--batch-size=4", "--nb_knn", "1", "3"]
    linear = ["--epochs=1", "--epoch-length=4", "--learning-rates", "0.1", "1.0", "--batch-size=4"]
    regression = ["--finetune-on-val", "--max-train-iters=30", "--train-dtype=float64", "--train-features-device"]
    embed = [weights, f"ImageFolder:root={tmp_path / 'val'}", "--image-size=16", "--num-workers=0", "--precision=fp32"]
    for python, device in ((ON_CPU, "cpu"), (ON_GPU, "cuda")):
        out = tmp_path / device
        run(python, "-m", "dinov2_custom.eval.knn", *small, "--output-dir", out / "knn", *knn)
        run(python, "-m", "dinov2_custom.eval.linear", *small, "--output-dir", out / "linear", *linear)
        # of the same features: of an untrained network's, the last bits decide how few images are classified
        run(ON_GPU, "-m", "dinov2_custom.eval.log_regression", *small, "--output-dir", out / "lr", *regression, device)
        run(python, "-m", "dinov2_custom.embed.main", *embed, "--output-dir", out / "embed", "--device", device)
    for name in ("knn/results_eval_knn.json", "linear/results_eval_linear.json", "lr/results_eval_log_regression.json"):
        assert (tmp_path / "cuda" / name).read_text() == (tmp_path / "cpu" / name).read_text()
    features = [np.load(tmp_path / device / "embed" / "features.npy") for device in ("cuda", "cpu")]
    np.testing.assert_allclose(*features, rtol=1e-4, atol=1e-5)
