"""Job parameters, without any institute's names."""

import getpass
from pathlib import Path

import pytest

from dinov2_custom.utils import cluster
from dinov2_custom.utils.cluster import (
    ClusterType,
    get_checkpoint_path,
    get_cluster_type,
    get_slurm_executor_parameters,
    get_slurm_partition,
    get_user_checkpoint_path,
)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("SBATCH_PARTITION", cluster.CHECKPOINT_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "commands, expected",
    [({"srun", "sbatch"}, ClusterType.SLURM), ({"srun"}, ClusterType.LOCAL), (set(), ClusterType.LOCAL)],
)
def test_cluster_type(monkeypatch, commands, expected):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: name if name in commands else None)
    assert get_cluster_type() is expected
    assert get_cluster_type(ClusterType.SLURM) is ClusterType.SLURM


def test_no_defaults_of_anybody():
    assert get_checkpoint_path() is None and get_user_checkpoint_path() is None and get_slurm_partition() is None
    parameters = get_slurm_executor_parameters(nodes=2, num_gpus_per_node=4)
    assert parameters == {"nodes": 2, "gpus_per_node": 4, "tasks_per_node": 4, "cpus_per_task": 10}


def test_environment_and_caller(monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    monkeypatch.setenv(cluster.CHECKPOINT_VARIABLE, "/data/runs")
    assert get_user_checkpoint_path() == Path("/data/runs") / getpass.getuser()
    assert get_slurm_executor_parameters(1, 0)["slurm_partition"] == "debug"
    given = get_slurm_executor_parameters(1, 0, cpus_per_task=2, mem_gb=8, slurm_partition="gpu")
    assert given == {
        "nodes": 1,
        "gpus_per_node": 0,
        "tasks_per_node": 1,
        "cpus_per_task": 2,
        "mem_gb": 8,
        "slurm_partition": "gpu",
    }
