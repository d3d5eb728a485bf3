"""Process groups: none for one process, gloo between two real ones started as SLURM starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dinov2_custom import distributed
from dinov2_custom.errors import LaunchError
from dinov2_custom.world import World

FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "SUBMITIT_", "TORCHELASTIC")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    yield
    distributed.disable()


def test_single_process_needs_no_group():
    before = dict(os.environ)
    for _ in range(2):
        distributed.enable()
        assert not distributed.is_enabled() and not dist.is_initialized()
        assert (distributed.get_global_rank(), distributed.get_global_size()) == (0, 1)
        assert (distributed.get_local_rank(), distributed.get_local_size()) == (0, 1)
        assert distributed.is_main_process()
    assert dict(os.environ) == before
    tensor = torch.tensor([3.0])
    assert distributed.all_reduce(tensor, average=True) is tensor and tensor.item() == 3.0
    assert distributed.broadcast_object("x") == "x"
    distributed.barrier()


def test_second_enable_with_another_environment():
    distributed._world = World(0, 2, 0, 2)  # as if started with two processes
    with pytest.raises(LaunchError, match="expected the environment of the first call"):
        distributed.enable()
    distributed.enable(overwrite=True)
    assert distributed.current_world().size == 1


def test_group_of_somebody_else_is_adopted_and_left_alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        distributed.enable()
        assert distributed.is_enabled() and distributed.current_world().source == "existing process group"
        distributed.disable()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "local_rank, gpus, source, index", [(0, 1, "torchrun", 0), (3, 4, "torchrun", 3), (1, 1, "SLURM", 0)]
)
def test_gpu_of_a_process(monkeypatch, local_rank, gpus, source, index):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert distributed._cuda_index(World(local_rank, 4, local_rank, 4, source=source)) == index


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LaunchError, match="at most 1 processes on this node.*got 2 .torchrun"):
        distributed._cuda_index(World(1, 2, 1, 2, source="torchrun"))


def test_failed_start_is_a_launch_error_and_leaves_nothing_behind(monkeypatch):
    def refuse(backend):
        raise RuntimeError("connection refused")

    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (variables | {"MASTER_ADDR": "node7", "MASTER_PORT": "29400"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    before = dict(os.environ)
    with pytest.raises(LaunchError, match="2 processes to meet at node7:29400 .*connection refused"):
        distributed.enable(set_cuda_current_device=False)
    assert dict(os.environ) == before
    assert distributed.current_world().size == 1


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NODEID": "0",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "nowhere[1-2]",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "tests.two_processes", str(tmp_path)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error
    _check_ranks([json.loads((tmp_path / f"facts{rank}.json").read_text()) for rank in range(2)])
    _check_files(tmp_path, [text for text, _ in outputs])


def _check_ranks(facts):
    shared = {"size": 2, "local_size": 2, "exported": "2", "sum": 3.0, "mean": 1.5, "object": {"from": 0}}
    shared |= {"global_avg": 6.5, "after": [False, 1, None]}
    for rank, found in enumerate(facts):
        own = {"rank": rank, "local_rank": rank, "main": rank == 0, "window_median": 1.0 + 10 * rank}
        assert found == own | shared


def _check_files(folder, printed):
    logs = folder / "logs"
    assert sorted(file.name for file in logs.iterdir()) == ["log.txt", "log.txt.rank1"]
    assert "hello from rank 0" in (logs / "log.txt").read_text()
    assert "hello from rank 1" in (logs / "log.txt.rank1").read_text()
    assert "hello from rank 0" in printed[0] and "hello" not in printed[1]
    assert "print of rank 1" in printed[1]  # print() is left alone
    assert (folder / "config.yaml").read_text() == "rank: 0\n"
    rows = [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]
    assert rows == [{"iteration": 1, "iter_time": 0.5, "data_time": 0.25, "loss": 1.0}]
