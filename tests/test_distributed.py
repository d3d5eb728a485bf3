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
from tests.eval.test_setup import make_run
from tests.eval.test_two_processes import overlapping_classes
from tests.processes import CEILING_S
from tests.train.batches import TINY

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


def test_a_foreign_group_is_adopted_and_kept(tmp_path):
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
    def refuse(*_, **__):
        raise RuntimeError("connection refused")

    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (variables | {"MASTER_ADDR": "node7", "MASTER_PORT": "29400"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", refuse)
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
    assert "print of rank 1" in printed[1]  # print() is unchanged
    assert (folder / "config.yaml").read_text() == "rank: 0\n"
    rows = [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]
    assert rows == [{"iteration": 1, "iter_time": 0.5, "data_time": 0.25, "loss": 1.0}]


@pytest.mark.parametrize(
    "capability, architectures, runs",
    [
        ((9, 0), "sm_75 sm_80 sm_90", True),
        ((8, 9), "sm_75 sm_80 sm_90", True),  # machine code runs on later minor versions
        ((8, 0), "sm_86 sm_90", False),  # and on no earlier one
        ((6, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120", False),
        ((7, 0), "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", True),
        ((12, 1), "sm_75 sm_90 compute_90", True),  # PTX runs on everything later
        ((7, 0), "sm_75 compute_90", False),
        ((10, 3), "sm_90 sm_100", True),
        ((10, 3), "sm_90a sm_100a compute_100a", False),  # of an "a" on that version alone
        ((10, 0), "sm_100a", True),
        ((10, 3), "sm_100f", True),
    ],
)
def test_which_builds_of_torch_run_on_which_gpu(capability, architectures, runs):
    assert distributed.has_kernels(capability, architectures.split()) == runs


@pytest.mark.parametrize("capability, remedy", [((6, 0), "CUDA 12.6"), ((13, 0), "newest torch")])
def test_a_gpu_without_kernels_is_refused_in_one_sentence(monkeypatch, capability, remedy):
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_capability", capability)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P100")
    with pytest.raises(LaunchError) as caught:
        distributed.enable()
    number = ".".join(map(str, capability))
    assert f"Tesla P100 (compute capability {number})" in str(caught.value) and "sm_75 sm_90" in str(caught.value)
    assert remedy in str(caught.value) and distributed.current_world().size == 1


def test_cores_that_several_processes_may_use_are_shared(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def share(*others):
        monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, *others])
        return distributed.share_of_cores()

    here = socket.gethostname()
    assert share() == 8
    assert share(*[(here, list(range(8)))] * 3) == 2  # no process is bound
    assert share((here, [8, 9]), ("elsewhere", list(range(8)))) == 8
    assert share(*[(here, list(range(8)))] * 9) == 1


def two_ranks(code, *arguments):
    """Return (exit code, stdout, stderr) of two processes; unlike a launcher, nothing else ends them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [job.communicate(timeout=CEILING_S) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [(job.returncode, *end) for job, end in zip(jobs, ends, strict=True)]


JOINS = """
import time, torch
import torch.distributed as dist
from dinov2_custom import distributed
for timeout_s in (77, 0, None):
    distributed.enable(timeout_s=timeout_s)
    for group in (dist.group.WORLD, distributed.second_group()):
        print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
    assert distributed.broadcast_object(timeout_s) == timeout_s
    is_late = distributed.is_main_process()
    distributed.disable()
    time.sleep(0.5 * is_late)  # when the other one looks for its address
"""


def test_groups_one_after_another_each_with_its_timeout():
    """As when one process trains twice: what a store keeps of an earlier group is not found by the next one."""
    for code, said, error in two_ranks(JOINS):
        assert code == 0, error
        assert [float(line) for line in said.split()] == [77, 77, 24 * 86400, 24 * 86400, 1800, 1800]


# One process raises an error in the middle of its work, while the other enters a collective. Taking groups apart
# waits forever, as nccl does for a collective that other processes are in.
RAISES = """
import importlib, os, sys, time
import torch.distributed as dist
dist.destroy_process_group = lambda *_: time.sleep(1000)
from dinov2_custom import entry
name, parser, broken, *arguments = sys.argv[1:]
module = importlib.import_module(name)

def raise_one(*args, **kwargs):
    raise KeyError("the fault")

if os.environ["RANK"] == "1":
    setattr(module, broken, raise_one)
elif name.endswith("train"):  # where the watchdog ends it: with nccl, nobody sees a broken connection
    from dinov2_custom.train import faults
    faults.LOOK_S, faults.GRACE_S = 0.1, 1.0
    dist.all_reduce = lambda *_, **__: time.sleep(1000)
package, _, function = parser.partition(":")
args = getattr(importlib.import_module(package), function)().parse_args(arguments)
entry.leave(entry.run(name, args))
"""


@pytest.mark.parametrize("command", ["train", "knn", "embed"])
def test_an_error_in_one_process_ends_them_all(command, tmp_path):
    _, _, weights = make_run(tmp_path / "run")
    overlapping_classes(tmp_path / "images", count=4, seed=0)
    small = ["--num-workers=0", "--batch-size=4"]
    if command == "train":
        images = f"train.dataset_path={tmp_path / 'images'}"
        what = ["dinov2_custom.train.train", "dinov2_custom.cli:train_parser", "accumulate_gradients"]
        what += [images, *TINY, "train.num_workers=0", "--output-dir", str(tmp_path / "out")]
    elif command == "knn":
        what = ["dinov2_custom.eval.knn", "dinov2_custom.eval.args:get_knn_args_parser", "ModelWithNormalize"]
        what += ["--pretrained-weights", str(weights), "--output-dir", str(tmp_path / "out"), *small]
        what += [f"--{part}-dataset=LabelledFolder:root={tmp_path / 'images'}" for part in ("train", "val")]
        what += ["--resize-size=16", "--crop-size=16"]
    else:
        what = ["dinov2_custom.embed.main", "dinov2_custom.cli:embed_parser", "_make_parts"]
        what += [str(weights), str(tmp_path / "images"), "--output-dir", str(tmp_path / "out"), *small]
    (waits, _, _), (raised, _, error) = two_ranks(RAISES, *what)
    assert raised == 1 and "KeyError: 'the fault'" in error, error
    assert waits == (75 if command == "train" else 1)
