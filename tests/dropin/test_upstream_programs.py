"""Upstream's own programs, run on this package: every ``dinov2.<x>`` that they import is ours.

They request a GPU by name; the copies used here request the CPU and are otherwise unchanged.
"""

from __future__ import annotations

import json

import pytest
import torch

from tests import processes
from tests.dropin.test_workflow import PREPARE, REPOSITORY, TINY, assert_knn_results, write_imagenet
from tests.oracle import OracleUnavailable, ensure_oracle
from tests.test_alias import fill_site

GPU_TO_CPU = {
    'torch.device("cuda")': 'torch.device("cpu")',
    "torch.cuda.current_device()": 'torch.device("cpu")',
    "torch.cuda.synchronize()": "pass",
    "partial(torch.cuda.amp.autocast, ": 'partial(torch.autocast, "cpu", ',
    "torch.cuda.amp.autocast(": 'torch.autocast("cpu", ',
    ".cuda(non_blocking=True)": "",
    ".cuda()": "",
}
THREE_ITERATIONS = ["train.OFFICIAL_EPOCH_LENGTH=1", "optim.epochs=3", "train.batch_size_per_gpu=4"]


class Upstream:
    """Upstream's package reduced to programs, an ImageNet of 36 images, and a place for what they write."""

    def __init__(self, source, site, folder):
        self.source, self.site, self.folder = source, site, folder
        write_imagenet(folder / "root")
        place = f"root={folder}/root:extra={folder}/extra"
        self.datasets = [f"ImageNet:split={split}:{place}" for split in ("TRAIN", "VAL")]
        self.run("-c", PREPARE, folder / "root", folder / "extra")

    def program(self, name):
        text = (self.source / name).read_text()
        assert "from dinov2." in text
        for gpu, cpu in GPU_TO_CPU.items():
            text = text.replace(gpu, cpu)
        assert "cuda" not in text.replace("torch.backends.cuda", "")
        path = self.folder / name.replace("/", "_")
        path.write_text(text)
        return path

    def run(self, *command, number=None):
        environment = {"PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
        done = processes.run(*map(str, command), cwd=self.site, environment=environment, processes=number)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def train(self, out, *more, number=None):
        config = REPOSITORY / "dinov2_custom" / "configs" / "train" / "vitl16_short.yaml"
        command = [self.program("train/train.py"), "--config-file", config, "--output-dir", out]
        overrides = [f"train.dataset_path={self.datasets[0]}", *TINY, *THREE_ITERATIONS, *more]
        return self.run(*command, *overrides, number=number)

    def evaluate(self, name, run, out, *more):
        weights = run / "eval" / "training_2" / "teacher_checkpoint.pth"
        train, val = self.datasets
        return self.run(
            *(self.program(f"eval/{name}.py"), "--config-file", run / "config.yaml", "--pretrained-weights", weights),
            *("--output-dir", out, "--train-dataset", train, "--val-dataset", val, *more),
        )


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    try:
        source = ensure_oracle() / "dinov2"
    except OracleUnavailable as e:
        pytest.skip(str(e))
    folder = tmp_path_factory.mktemp("upstream")
    (folder / "site").mkdir()
    return Upstream(source, fill_site(folder / "site"), folder)


@pytest.fixture(scope="module")
def trained(upstream):
    """The run directory of upstream's train/train.py: three iterations, a checkpoint in each, by fvcore."""
    out = upstream.folder / "run"
    upstream.train(out, "evaluation.eval_period_iterations=3")
    return out


def rows(run):
    return [json.loads(line) for line in (run / "training_metrics.json").read_text().splitlines()]


def test_train(upstream, trained):
    assert [row["iteration"] for row in rows(trained)] == [0, 2]
    teacher = torch.load(trained / "eval" / "training_2" / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert {name.split(".")[0] for name in teacher} == {"backbone", "dino_head"}
    assert (trained / "last_checkpoint").read_text() == "model_final.pth"

    before = torch.load(trained / "model_final.pth", weights_only=True)
    assert before["iteration"] == 2 and len(before["optimizer"]["state"]) > 0
    upstream.train(trained, "optim.epochs=4")  # resumes from there
    after = torch.load(trained / "model_final.pth", weights_only=True)
    assert after["iteration"] == 3
    assert not torch.equal(after["model"]["student.backbone.cls_token"], before["model"]["student.backbone.cls_token"])


def test_train_keeps_as_many_checkpoints_as_fvcore_is_configured_for(upstream, tmp_path):
    """Upstream's period is three epochs; with epochs of one iteration that is a checkpoint every third."""
    upstream.train(tmp_path, "optim.epochs=14")
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert names == {f"model_{iteration:07d}.pth" for iteration in (5, 8, 11)} | {"model_final.pth"}


def test_train_in_two_processes(upstream, tmp_path):
    upstream.train(tmp_path, number=2)
    assert [row["iteration"] for row in rows(tmp_path)] == [0, 2]


def test_knn(upstream, trained, tmp_path):
    upstream.evaluate("knn", trained, tmp_path, "--nb_knn", "3", "10", "--batch-size", "8")
    assert_knn_results(tmp_path)


def test_linear(upstream, trained, tmp_path):
    sizes = ("--epochs", "2", "--epoch-length", "3", "--batch-size", "8", "--num-workers", "1")
    upstream.evaluate("linear", trained, tmp_path, *sizes, "--learning-rates", "1e-3", "0.1")
    text = (tmp_path / "results_eval_linear.json").read_text()
    assert text.startswith('iter: 6\n{"best_classifier": {"name": "classifier_') and text.endswith("\n\n")
