"""Turn what SLURM says against a job into one sentence: which flags, what there is, what was asked for.

Not the submission (``slurm.py``). Torch-free. Read :func:`explain` first.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from dinov2_custom.run.args import count_gpus, minutes

QUERY_TIMEOUT_S = 30
# what sbatch says in small letters -> flag, option of sbatch, what was expected, how to see it
_ONE_FLAG = {
    "qos": ("--qos", "qos", "a quality of service you may use", "`sacctmgr show qos format=name` lists them"),
    "feature": ("--constraint", "constraint", "features that nodes have", "`sinfo --format '%N %f'` lists them"),
    "reservation": ("--reservation", "reservation", "one that there is", "`scontrol show reservation` lists them"),
    "node name": ("--exclude", "exclude", "names of nodes", "`sinfo --Node` lists them"),
    "--mem": ("--mem, --mem-per-gpu", "mem", "a size such as 64G", "see `man sbatch`"),
}
_SIZES = ("time", "nodes", "ntasks-per-node", "gpus-per-node", "gres", "cpus-per-task", "mem", "mem-per-gpu")
_TOO_LARGE = ("node configuration", "partitionconfig", "nodelimit", "node count", "gres", "more processors")
_TOO_LARGE += ("timelimit", "time limit", "wallduration", "memory specification")


def explain(stderr: str, script: str, environment: Mapping[str, str]) -> str:
    """Return the sentence for ``stderr``, sbatch's complaint about ``script``."""
    said = [re.sub(r"^sbatch: (error: )?", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    reason = "; ".join(dict.fromkeys(said)) or "no reason"
    low = reason.lower()
    asked = _asked(script)
    if is_silence(stderr):
        return f"SLURM: expected a controller that answers, got: {reason}; try again later, or ask the administrators"
    if "violates accounting" in low or re.search(r"\b(assoc|qos)(grp|max|min)", low):
        return (
            f"SLURM: expected a job within the limits of your account and QOS, got {_of(asked, *_SIZES)} ({reason}); "
            "`sacctmgr show associations user=$USER` and `sacctmgr show qos` list them"
        )
    if "account" in low:  # before the partition, which the same sentence of SLURM's names
        return (
            "--account, --partition, --qos: expected a combination you may use, got "
            f"{_of(asked, 'account', 'partition', 'qos')} ({reason}); "
            "`sacctmgr show associations user=$USER` lists yours"
        )
    if "partition" in low and "invalid" in low:
        there = ", ".join(ask(["sinfo", "--noheader", "--format", "%R"], environment).split())
        return f"--partition: expected one of {there or '(none is known)'}, got {asked.get('partition')!r}"
    if any(word in low for word in _TOO_LARGE):
        return _explain_size(script, asked, reason, environment)
    for word, (flag, option, expected, see) in _ONE_FLAG.items():
        if word in low and option in asked:
            return f"{flag}: expected {expected}, got {asked[option]} ({reason}); {see}"
    return f"SLURM: expected a job that it accepts, got: {reason}; --dry-run prints what was submitted"


class _Nodes(NamedTuple):
    """What ``sinfo`` says of nodes of one kind in a partition."""

    partition: str
    count: int
    cpus: int
    memory: int
    gres: str
    limit: str

    def gpus(self) -> int:
        return sum(int(number) for number in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", self.gres))


def _nodes(partition: str | None, environment: Mapping[str, str]) -> list[_Nodes]:
    """Return the kinds of nodes of ``partition``, which may be several, or of the default one; [] if none is known."""
    lines = ask(["sinfo", "--noheader", "--format", "%R|%D|%c|%m|%G|%l|%P"], environment).splitlines()
    rows = [line.strip().split("|") for line in lines if line.count("|") == 6]
    wanted = partition.split(",") if partition else []
    chosen = [row for row in rows if (row[0] in wanted if wanted else row[6].endswith("*"))] or rows
    return [_Nodes(r[0], int(r[1]), int(r[2].rstrip("+")), int(r[3].rstrip("+")), r[4], r[5]) for r in chosen]


def cpus_per_task(tasks: int, partition: str | None, environment: Mapping[str, str]) -> int:
    """Return how many CPUs each of ``tasks`` processes on a node of ``partition`` can have, at most upstream's 10."""
    nodes = _nodes(partition or environment.get("SBATCH_PARTITION"), environment)
    return max(1, min([10, *(kind.cpus // tasks for kind in nodes)]))


def too_much(script: str, environment: Mapping[str, str]) -> list[str]:
    """Return what in ``script`` is larger than what any node of the partition has, as far as can be seen."""
    asked = _asked(script)
    nodes = _nodes(asked.get("partition") or environment.get("SBATCH_PARTITION"), environment)
    if not nodes:
        return []
    minutes_asked, tasks, cpus = (int(asked.get(name, 1)) for name in ("time", "ntasks-per-node", "cpus-per-task"))
    found = []
    if (limit := max(_minutes(kind.limit) for kind in nodes)) < minutes_asked:
        found.append(f"--timeout of {minutes_asked} minutes, where the limit is {limit:g}")
    if (most := max(kind.cpus for kind in nodes)) < tasks * cpus:
        found.append(
            f"{tasks} processes (--ngpus) x {cpus} CPUs (--cpus-per-task) on a node, where one has at most {most}"
        )
    gpus = int(asked.get("gpus-per-node", 0)) or count_gpus(asked.get("gres", ""))
    if (most := max(kind.gpus() for kind in nodes)) < gpus:
        found.append(f"{gpus} GPUs (--ngpus) on a node, where one has at most {most}")
    memory = _megabytes(asked.get("mem", "")) or _megabytes(asked.get("mem-per-gpu", "")) * gpus
    if (most := max(kind.memory for kind in nodes)) < memory:
        found.append(f"{memory} MB of memory (--mem, --mem-per-gpu) on a node, where one has at most {most}")
    if sum(kind.count for kind in nodes) < int(asked.get("nodes", 1)):
        found.append(f"--nodes {asked['nodes']}")
    return found


def _megabytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.upper())
    return int(int(match[1]) * 1024 ** ("KMGT".index(match[2] or "M") - 1)) if match else 0


def _asked(script: str) -> dict[str, str]:
    """Return the options of sbatch in ``script`` that have a value."""
    found = re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE)
    return {name: " ".join(shlex.split(value)) for name, value in found}


def _explain_size(script: str, asked: Mapping[str, str], reason: str, environment: Mapping[str, str]) -> str:
    """Name what is larger than any node of the partition, where that can be seen, and list what there is."""
    there = "; ".join(
        f"{kind.partition}: {kind.count} nodes, {kind.cpus} CPUs, {kind.memory} MB, {kind.gres}, {kind.limit}"
        for kind in _nodes(asked.get("partition"), environment)[:8]
    )
    excess = too_much(script, environment)
    flags = "--ngpus, --cpus-per-task, --nodes, --timeout"
    flags += "".join(f", --{name}" for name in ("mem", "mem-per-gpu", "gres") if name in asked)
    more = f"; too much: {', '.join(excess)}" if excess else ""
    return f"{flags}: expected what there is ({there}), got {_of(asked, *_SIZES)} ({reason}){more}"


def _minutes(limit: str) -> float:
    """Read a time limit as sinfo prints it: D-HH:MM:SS, HH:MM:SS, MM:SS or infinite."""
    try:
        return minutes(limit)
    except argparse.ArgumentTypeError:
        return float("inf")


def is_silence(stderr: str) -> bool:
    """Return whether no controller answered."""
    return any(word in stderr.lower() for word in ("contact", "connect", "slurm_load", "configuration source"))


def _of(asked: Mapping[str, str], *names: str) -> str:
    return " ".join(f"{name}={asked[name]}" for name in names if name in asked) or "none of them"


def ask(command: list[str], environment: Mapping[str, str]) -> str:
    """Return what ``command`` prints; "" if it is not there or does not answer."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, env=dict(environment), timeout=QUERY_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
