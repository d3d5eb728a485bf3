"""Cluster settings of a job, under upstream's names, without any institute's partitions or paths.

Every default can be set by the environment variable that SLURM itself reads, or by the caller. Torch-free.
"""

from __future__ import annotations

import getpass
import os
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

CHECKPOINT_VARIABLE = "DINOV2_CHECKPOINT_PATH"


class ClusterType(Enum):
    """The kind of scheduler that runs jobs."""

    SLURM = "slurm"
    LOCAL = "local"


def get_cluster_type(cluster_type: ClusterType | None = None) -> ClusterType:
    """Return ``cluster_type`` if given, else SLURM if its commands are installed, else LOCAL."""
    if cluster_type is not None:
        return cluster_type
    installed = shutil.which("sbatch") and shutil.which("srun")
    return ClusterType.SLURM if installed else ClusterType.LOCAL


def get_checkpoint_path(cluster_type: ClusterType | None = None) -> Path | None:
    """Return the folder of DINOV2_CHECKPOINT_PATH, where all users of the cluster keep checkpoints; None if unset."""
    path = os.environ.get(CHECKPOINT_VARIABLE)
    return Path(path).expanduser() if path else None


def get_user_checkpoint_path(cluster_type: ClusterType | None = None) -> Path | None:
    """Return this user's folder in :func:`get_checkpoint_path`; None if that is None."""
    path = get_checkpoint_path(cluster_type)
    return path / getpass.getuser() if path else None


def get_slurm_partition(cluster_type: ClusterType | None = None) -> str | None:
    """Return SBATCH_PARTITION; None, which means SLURM's default partition, if unset."""
    return os.environ.get("SBATCH_PARTITION") or None


def get_slurm_executor_parameters(
    nodes: int, num_gpus_per_node: int, cluster_type: ClusterType | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Return submitit's parameters for one task per GPU, with 10 CPUs each; ``kwargs`` add to and override them.

    No memory is requested unless ``mem_gb`` is given, so the cluster's default applies.
    """
    parameters: dict[str, Any] = {
        "nodes": nodes,
        "gpus_per_node": num_gpus_per_node,
        "tasks_per_node": max(num_gpus_per_node, 1),
        "cpus_per_task": 10,
    }
    partition = get_slurm_partition(cluster_type)
    if partition:
        parameters["slurm_partition"] = partition
    return parameters | kwargs
