"""A job that was given GPUs and sees none says so instead of running on the CPU."""

import pytest
import torch

from dinov2_custom.errors import LaunchError
from dinov2_custom.run.gpus import check_gpus
from dinov2_custom.run.submit import Task


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"SKYPILOT_NUM_GPUS_PER_NODE": "0"},
        {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": ""},
    ],
)
def test_none_given(no_gpu, environment):
    check_gpus(environment)


@pytest.mark.parametrize("environment", [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"SKYPILOT_NUM_GPUS_PER_NODE": "8"}])
@pytest.mark.parametrize("cuda, why", [(None, "is a build without CUDA"), ("12.8", "see whether `nvidia-smi` works")])
def test_given_and_not_seen(no_gpu, monkeypatch, environment, cuda, why):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    (pair,) = environment.items()
    with pytest.raises(LaunchError) as e:
        check_gpus(environment)
    assert "=".join(pair) in str(e.value) and why in str(e.value) and "--cpu" in str(e.value)


def test_given_and_seen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_gpus({"CUDA_VISIBLE_DEVICES": "0"})


def test_every_task_looks_before_it_starts(no_gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(LaunchError, match="CUDA_VISIBLE_DEVICES=0"):
        Task(None)()
