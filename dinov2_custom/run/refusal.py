"""Query a cluster's resources, and explain SLURM's refusal of a job: flags, available and requested resources.

Does not import torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from dinov2_custom.run.args import count_gpus, minutes

QUERY_TIMEOUT_S = 30
_SIZES = ("time", "nodes", "ntasks-per-node", "gpus-per-node", "gres", "cpus-per-task", "mem", "mem-per-gpu")
_FLAGS = {"time": "timeout", "ntasks-per-node": "ngpus", "gpus-per-node": "ngpus"}
_OF_ACCOUNTS = "`sacctmgr show associations user=$USER` and `id` list yours"
# SLURM's message in lower case; options concerned; expectation; command that shows it. The first match is used.
_REASONS = (
    ("contact|connect|slurm_load|configuration source", (), "a controller that answers", "ask the administrators"),
    (r"violates accounting|\b(assoc|qos)(grp|max|min)", _SIZES, "a job within the limits of your account and QOS",
     "`sacctmgr show associations user=$USER` and `sacctmgr show qos` list them"),
    ("partition not available|partition down", ("partition",), "a partition that is up",
     "`sinfo --summarize` lists them"),
    # must precede the partition, which the same message of SLURM names
    ("account|group|allows qos", ("account", "partition", "qos"), "a combination you may use", _OF_ACCOUNTS),
    ("invalid.*partition", ("partition",), "one of {partitions}", "`sinfo --summarize` lists them"),
    ("node configuration|node count|nodelimit|partitionconfig|gres|more processors|time ?limit|duration|memory spec",
     _SIZES, "at most what the nodes have ({nodes})", ""),
    ("qos", ("qos",), "a quality of service you may use", "`sacctmgr show qos format=name` lists them"),
    ("feature", ("constraint",), "features that nodes have", "`sinfo --format '%N %f'` lists them"),
    ("reservation", ("reservation",), "an existing one", "`scontrol show reservation` lists them"),
    ("node name", ("exclude",), "names of nodes", "`sinfo --Node` lists them"),
    ("--mem", ("mem", "mem-per-gpu"), "a size such as 64G", "see `man sbatch`"),
    ("", (), "a job that it accepts", "--dry-run prints what was submitted"),
)  # fmt: skip


def explain(stderr: str, script: str) -> str:
    """Return an explanation of ``stderr``, SLURM's error message for ``script``."""
    said = [re.sub(r"^(sbatch: )?(error: )?", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    reason = "; ".join(dict.fromkeys(said)) or "no reason"
    asked = _asked(script)
    options, expected, see = next(row[1:] for row in _REASONS if re.search(row[0], reason.lower()))
    flags = dict.fromkeys(f"--{_FLAGS.get(name, name)}" for name in options if name in asked)
    got = " ".join(f"{name}={asked[name]}" for name in options if name in asked)
    if "{nodes}" in expected:
        expected = expected.format(nodes="; ".join(map(str, _nodes(asked.get("partition"))[:8])))
        see = "; ".join(f"too much: {text}" for text in too_much(script)) or "`sinfo` lists it"
    elif "{partitions}" in expected:
        expected = expected.format(partitions=", ".join(ask("sinfo", "--noheader", "--format", "%R").split()) or "none")
    got = f"got {got} ({reason})" if got else f"got: {reason}"
    return f"{', '.join(flags) or 'SLURM'}: expected {expected}, {got}; {see}"


def is_unreachable(stderr: str) -> bool:
    """Return whether no controller answered."""
    return bool(re.search(_REASONS[0][0], stderr.lower()))


class _Nodes(NamedTuple):
    """Resources of one kind of node in a partition, from ``sinfo``."""

    partition: str
    count: int
    cpus: int
    memory: int
    gres: str
    limit: str

    def __str__(self) -> str:
        return f"{self.partition}: {self.count} nodes, {self.cpus} CPUs, {self.memory} MB, {self.gres}, {self.limit}"

    def gpus(self) -> int:
        return count_gpus(re.sub(r"\([^)]*\)", "", self.gres))


def _nodes(partition: str | None) -> list[_Nodes]:
    """Return the kinds of nodes in ``partition`` (possibly a list), or in the default partition; [] if unknown."""
    lines = ask("sinfo", "--noheader", "--format", "%R|%D|%c|%m|%G|%l|%P").splitlines()
    rows = [line.strip().split("|") for line in lines if line.count("|") == 6]
    partition = partition or os.environ.get("SBATCH_PARTITION")
    wanted = partition.split(",") if partition else []
    chosen = [row for row in rows if (row[0] in wanted if wanted else row[6].endswith("*"))] or rows
    return [_Nodes(r[0], int(r[1]), int(r[2].rstrip("+")), int(r[3].rstrip("+")), r[4], r[5]) for r in chosen]


def cpus_per_task(tasks: int, partition: str | None) -> int:
    """Return the number of CPUs available to each of ``tasks`` processes on a node, at most upstream's 10."""
    return max(1, min([10, *(kind.cpus // tasks for kind in _nodes(partition))]))


def too_much(script: str) -> list[str]:
    """Return the requests in ``script`` that exceed every node of the partition, as far as is known."""
    asked = _asked(script)
    nodes = _nodes(asked.get("partition"))
    time, tasks, cpus = (int(asked.get(name, 1)) for name in ("time", "ntasks-per-node", "cpus-per-task"))
    gpus = int(asked.get("gpus-per-node", 0)) or count_gpus(asked.get("gres"))
    memory = _megabytes(asked.get("mem", "")) or _megabytes(asked.get("mem-per-gpu", "")) * gpus
    processes = f"{tasks} processes (--ngpus) x {cpus} CPUs (--cpus-per-task)"
    on_a_node = "on a node, where one has at most {}"
    limits = (
        (f"--timeout of {time} minutes, where the limit is {{:g}}", time, [_minutes(kind.limit) for kind in nodes]),
        (f"{processes} {on_a_node}", tasks * cpus, [kind.cpus for kind in nodes]),
        (f"{gpus} GPUs (--ngpus) {on_a_node}", gpus, [kind.gpus() for kind in nodes]),
        (f"{memory} MB of memory (--mem, --mem-per-gpu) {on_a_node}", memory, [kind.memory for kind in nodes]),
        ("--nodes, where there are {}", int(asked.get("nodes", 1)), [sum(kind.count for kind in nodes)]),
    )
    return [text.format(max(there)) for text, wanted, there in limits if nodes and wanted > max(there)]


def closed_partition(script: str) -> str:
    """Return why the job of ``script`` would be pending forever, which `sbatch --test-only` does not detect, or "".

    This is the case if every requested partition is down, or excludes its account, QOS or time limit.
    """
    asked = _asked(script)
    wanted = asked.get("partition") or os.environ.get("SBATCH_PARTITION")
    lines = ask("scontrol", "show", "partition", "--oneliner").splitlines()
    partitions = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    reasons = [
        _closed(facts, asked)
        for facts in partitions
        if (facts.get("PartitionName") in wanted.split(",") if wanted else facts.get("Default") == "YES")
    ]
    return "" if "" in reasons or not reasons else reasons[0]


def _closed(facts: Mapping[str, str], asked: Mapping[str, str]) -> str:
    name = facts["PartitionName"]
    if facts.get("State", "UP") != "UP":
        return f"partition {facts['State']}"
    if facts.get("AllowAccounts", "ALL") != "ALL" or "DenyAccounts" in facts:
        command = ("sacctmgr", "--noheader", "--parsable2", "show", "user", os.environ.get("USER", ""))
        account = asked.get("account") or ask(*command, "format=DefaultAccount").strip()
        if not _is_allowed("Accounts", account, facts):
            return f"account {account or 'unknown'}, where {name} allows {facts.get('AllowAccounts', 'others')}"
    if "qos" in asked and not _is_allowed("Qos", asked["qos"], facts):
        return f"{name} allows QOS {facts.get('AllowQos', 'others')}"
    return "PartitionTimeLimit" if _minutes(facts.get("MaxTime", "")) < int(asked.get("time", 1)) else ""


def _is_allowed(kind: str, value: str, facts: Mapping[str, str]) -> bool:
    allowed = facts.get(f"Allow{kind}", "ALL")
    return (allowed == "ALL" or value in allowed.split(",")) and value not in facts.get(f"Deny{kind}", "").split(",")


def _megabytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.upper())
    return int(int(match[1]) * 1024 ** ("KMGT".index(match[2] or "M") - 1)) if match else 0


def _asked(script: str) -> dict[str, str]:
    """Return the sbatch options in ``script`` that have a value."""
    found = re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE)
    return {name: " ".join(shlex.split(value)) for name, value in found}


def _minutes(limit: str) -> float:
    """Parse a time limit as printed by sinfo: D-HH:MM:SS, HH:MM:SS, MM:SS or infinite."""
    try:
        return minutes(limit)
    except argparse.ArgumentTypeError:
        return float("inf")


def call(*command: str, input: str | None = None) -> tuple[int | None, str, str]:
    """Return exit code, stdout and stderr of ``command``; (None, "", reason) if it is missing or times out."""
    try:
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except FileNotFoundError:
        return None, "", f"no {command[0]} on PATH"
    except (OSError, subprocess.TimeoutExpired) as e:
        return None, "", str(e)
    return done.returncode, done.stdout, done.stderr


def ask(*command: str) -> str:
    """Return the output of ``command``, or "" if it fails."""
    return call(*command)[1]
