"""Whole runs on the stand-in: how often a step waits for the device, and the error of a full device.

Run by ``test_cuda_host.py``. Kernels are not run, so no number is finite and every step is skipped.
"""

import os
import subprocess
import sys
from contextlib import closing, suppress

import pytest

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.data.loaders import make_train_loader
from dinov2_custom.errors import DataError
from dinov2_custom.train import online
from dinov2_custom.train import train as train_module
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.step_guard import StepGuard
from dinov2_custom.utils import transfer
from tests.cuda_host.counts import counted, counts, sync_stacks, syncs
from tests.cuda_host.run import REPOSITORY
from tests.data.pictures import make_folder

LOG_EVERY, STEPS = 5, 16
RUN = [
    *("--config-file", "configs/quickstart.yaml", f"train.max_steps={STEPS}", f"train.log_every={LOG_EVERY}"),
    *("train.batch_size_per_gpu=4", "train.max_nonfinite_steps=1000"),
]


@pytest.fixture
def dataset(tmp_path):
    make_folder(tmp_path / "images", [f"{i}.png" for i in range(12)], 64, 64)
    return f"train.dataset_path=ImageFolder:root={tmp_path / 'images'}"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_waits_for_what_is_there_and_a_log_line_once(workers, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    seen, check = [], StepGuard.check

    def counting(self, *args, **kwargs):
        seen.append(counts())
        return check(self, *args, **kwargs)

    monkeypatch.setattr(StepGuard, "check", counting)
    options = [*RUN, dataset, "--output-dir", str(tmp_path / "run"), f"train.num_workers={workers}"]
    assert train_module.main(train_module.get_args_parser().parse_args(options)) == 0
    steps = [after - before for before, after in zip(seen, seen[1:], strict=False)]
    for number, step in enumerate(steps[2:], start=2):
        logs = number % LOG_EVERY == 0
        # the copy of the batch of a step ago, the report of a step ago; a copy to pageable memory counts twice
        assert step["sync event"] == 2
        assert syncs(step) == (4 if logs else 2), (number, step)
        assert step["copy device to pageable"] == logs
        assert not workers or step["copy pageable to device"] == 0
        assert step["cudaMalloc"] == 0 or number < 8


def test_a_run_continues_if_memory_cannot_be_pinned(dataset, tmp_path):
    """A failed call remains CUDA's last error, which torch raises at the next kernel launch."""
    command = [sys.executable, "run/train/train.py", *RUN, dataset, "--output-dir", str(tmp_path / "run")]
    command += ["train.num_workers=2", "train.max_steps=4"]
    refusing = os.environ | {"CUDA_HOST_NO_PINNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=refusing, capture_output=True, text=True, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "memory could not be pinned (CUDA error 801)" in said, said


def test_a_full_device_is_reported_in_one_sentence(dataset, tmp_path):
    command = [sys.executable, "run/train/train.py", *RUN, dataset, "--output-dir", str(tmp_path / "run")]
    command += ["student.arch=vit_small", "train.batch_size_per_gpu=16", "train.num_workers=0"]
    small = os.environ | {"CUDA_HOST_MEMORY": str(500 * 2**20)}
    done = subprocess.run(command, cwd=REPOSITORY, env=small, capture_output=True, text=True, timeout=600)
    last = done.stderr.splitlines()[-1]
    assert done.returncode and last.startswith("error: memory: expected room for a batch of 16 images per process")
    assert "Tried to allocate" in last and "Traceback" not in done.stderr


def test_an_evaluation_waits_for_the_device_after_its_last_forward_pass_only(dataset, tmp_path, monkeypatch):
    labelled = f"LabelledFolder:root={tmp_path}"  # of one class, images
    cfg = load_run_config(
        str(REPOSITORY / "configs/quickstart.yaml"),
        [dataset, "train.batch_size_per_gpu=4", "evaluation.online.every=1", "train.num_workers=2"]
        + [f"evaluation.online.{part}={labelled}" for part in ("knn_train", "knn_val")],
        str(tmp_path / "run"),
    )
    monkeypatch.setattr(online, "KNN_BATCH", 4)
    model = SSLMetaArch(cfg).to("cuda").train()
    model.prepare_for_distributed_training()
    passes, waits, original = [], [], transfer.HostCopy.wait

    def wait(copy):
        if copy.ready is not None:
            waits.append(len(passes))
        return original(copy)

    monkeypatch.setattr(transfer.HostCopy, "wait", wait)
    model.teacher["backbone"].register_forward_hook(lambda *args: passes.append(1))
    with closing(online.OnlineEvaluation(cfg, make_train_loader(cfg, rank=0, world_size=1))) as evaluation:
        for _ in range(2):  # in the first one, memory is pinned
            passes.clear(), waits.clear()
            # no kernel runs, so what is read is arbitrary: also which labelled images were seen, or read
            with counted() as found, sync_stacks() as stacks, suppress(DataError):
                evaluation.evaluate(model, 0, 0.05, lambda: 0.0)
    assert len(passes) == 3 + 3 and waits and set(waits) == {len(passes)}
    assert found["sync event"] == len(waits) and syncs(found) - len(waits) <= 1, stacks  # one for the error
    assert found["copy pageable to device"] == 0 and found["cudaMalloc"] == 0
    assert found["copy pinned to device"] >= 3 * 2 + 3
