"""Read rank and world size of a process from environment variables. Torch-free.

A complete torchrun environment takes precedence, then a task of a multi-task SLURM step, then one of submitit's local
executor; otherwise the process is alone, as with only ``WORLD_SIZE=1``.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dinov2_custom.errors import LaunchError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TORCHRUN_VARIABLES = (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT")
_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # Open MPI's and MPICH's mpirun
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # SLURM numbers its interactive, batch and extern steps from here on


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class World:
    """Ranks and sizes of this process: 0 <= rank < size over all nodes, 0 <= local_rank < local_size on its node.

    ``source`` describes where the values come from; it is ignored in comparisons.

    Raises:
        LaunchError: the values contradict each other.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    source: str = field(default="single process", compare=False)

    def __post_init__(self):
        wrong = []
        if not 0 <= self.rank < self.size:
            wrong.append(f"rank {self.rank} of world size {self.size}")
        if not 0 <= self.local_rank < self.local_size <= self.size:
            wrong.append(f"local rank {self.local_rank} of {self.local_size} on the node and {self.size} in all")
        if not 0 < self.master_port < 65536:
            wrong.append(f"master port {self.master_port}")
        if wrong:
            raise LaunchError(
                f"{self.source} environment: expected 0 <= rank < world size and a port in 1..65535, got "
                f"{'; '.join(wrong)}. Start all processes with one torchrun or srun command."
            )


def world_from_environment(environment: Mapping[str, str]) -> World:
    """Return this process's world from ``environment``; see the module docstring for the precedence.

    ``MASTER_ADDR`` and ``MASTER_PORT`` override what SLURM implies; on their own they have no effect, since some
    clusters set them for all jobs.

    Raises:
        LaunchError: some, but not all, of torchrun's variables are set, or only those of mpirun.
    """
    missing = [name for name in TORCHRUN_VARIABLES if not environment.get(name)]
    if not missing:
        rank, size, local_rank, local_size = (_integer(environment, name) for name in RANK_VARIABLES)
        master = environment["MASTER_ADDR"], _integer(environment, "MASTER_PORT")
        return World(rank, size, local_rank, local_size, *master, source="torchrun")
    world = _world_from_slurm(environment) or _world_from_submitit_local(environment)
    if world is not None:
        return world
    found = [name for name in RANK_VARIABLES if environment.get(name)]
    if "WORLD_SIZE" in found and _integer(environment, "WORLD_SIZE") == 1:  # containers and notebooks export it
        given = dict(zip(("rank", "size", "local_rank", "local_size"), RANK_VARIABLES, strict=True))
        return World(**{key: _integer(environment, name) for key, name in given.items() if name in found})
    if found:
        raise LaunchError(
            f"expected all of {', '.join(TORCHRUN_VARIABLES)} in the environment or none, got {', '.join(found)} "
            f"without {', '.join(missing)}. Start with `torchrun`, which sets them all, or unset {', '.join(found)}."
        )
    for name in _OF_MPI:
        if environment.get(name, "1") != "1":
            raise LaunchError(
                f"expected torchrun or srun to start several processes, got mpirun ({name}={environment[name]}); start "
                "with `torchrun --nproc-per-node N run/train/train.py ...`, or with --ngpus N and no mpirun"
            )
    return World()


def _world_from_slurm(environment: Mapping[str, str]) -> World | None:
    """Return None unless srun started this process as one of several (not batch scripts and interactive shells)."""
    step = environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID")
    if not step or not environment.get("SLURM_PROCID") or not environment.get("SLURM_NTASKS"):
        return None
    counts = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    size = _integer(environment, counts)
    if not step.isdecimal() or int(step) >= _FIRST_SPECIAL_STEP or size <= 1:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    return World(
        rank=_integer(environment, "SLURM_PROCID"),
        size=size,
        local_rank=_integer(environment, "SLURM_LOCALID"),
        local_size=_tasks_on_node(per_node, _integer(environment, "SLURM_NODEID")),
        master_addr=environment.get("MASTER_ADDR") or expand_nodelist(nodes)[0],
        master_port=_master_port(environment, "SLURM_JOB_ID", int(step)),
        source="SLURM",
    )


def _world_from_submitit_local(environment: Mapping[str, str]) -> World | None:
    if environment.get("SUBMITIT_EXECUTOR") != "local" or not environment.get("SUBMITIT_LOCAL_NTASKS"):
        return None
    size = _integer(environment, "SUBMITIT_LOCAL_NTASKS")
    if size <= 1:
        return None
    rank, local_rank = (_integer(environment, f"SUBMITIT_LOCAL_{name}") for name in ("GLOBALID", "LOCALID"))
    port = _master_port(environment, "SUBMITIT_LOCAL_JOB_ID", 0)
    return World(rank, size, local_rank, size, environment.get("MASTER_ADDR") or "127.0.0.1", port, "submitit local")


def expand_nodelist(nodelist: str) -> list[str]:
    """Return the host names of a SLURM node list, in order: ``"a,n[08-10]-ib"`` is a, n08-ib, n09-ib, n10-ib.

    Raises:
        LaunchError: the list is empty or malformed.
    """
    # a name is a row of plain runs and bracket groups; commas separate names outside brackets, ranges inside
    names = re.findall(r"(?:[^,\[\]\s]|\[[^\[\]]*\])+", nodelist)
    hosts: list[str] = []
    try:
        if not names or ",".join(names) != nodelist:
            raise ValueError("brackets or commas do not match")
        for name in names:
            parts = re.findall(r"\[[^\]]*\]|[^\[\]]+", name)
            choices = [list(_numbers(part[1:-1])) if part[0] == "[" else [part] for part in parts]
            hosts += ["".join(choice) for choice in itertools.product(*choices)]
    except ValueError as e:
        raise LaunchError(
            f"expected a SLURM node list such as 'gpu5,node[01-02]', got {nodelist!r}: {e}. "
            "Set MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there."
        ) from e
    return hosts


def _numbers(ranges: str) -> Iterator[str]:
    """Yield the numbers of ``01-03,07``, keeping zero padding."""
    for item in ranges.split(","):
        first, dash, last = item.partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(last) >= int(first))):
            raise ValueError(f"{item!r} is not a number or a range")
        for value in range(int(first), int(last or first) + 1):
            yield f"{value:0{len(first)}d}"


def _tasks_on_node(per_node: str, node: int) -> int:
    """Return entry ``node`` of SLURM's ``4(x2),3`` = 4, 4, 3."""
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node):
        counts += [int(count)] * int(repeats or 1)
    if node >= len(counts):
        raise LaunchError(
            f"expected SLURM_TASKS_PER_NODE to give the number of tasks of node {node}, got {per_node!r}. "
            "Start with srun, or with torchrun on each node."
        )
    return counts[node]


def _master_port(environment: Mapping[str, str], job_variable: str, step: int) -> int:
    """Return MASTER_PORT, else a port common to all tasks, below the ephemeral range."""
    if environment.get("MASTER_PORT"):
        return _integer(environment, "MASTER_PORT")
    job = re.sub(r"\D", "", environment.get(job_variable, "")) or "0"
    return 10_000 + (int(job) + 7919 * step) % 20_000


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError) as e:
        got = environment.get(name)
        raise LaunchError(f"expected a number in the environment variable {name}, got {got!r}. Set or unset it.") from e
