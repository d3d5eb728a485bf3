"""Turn what SLURM says against a job into one sentence: which flags, what there is, what was asked for.

Not the submission (``slurm.py``). Torch-free. Read :func:`explain` first.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Mapping

from dinov2_custom.run.args import minutes

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
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    if "contact" in low or "connect" in low or "slurm_load" in low:
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
        return _explain_size(asked, reason, environment)
    for word, (flag, option, expected, see) in _ONE_FLAG.items():
        if word in low and option in asked:
            return f"{flag}: expected {expected}, got {asked[option]} ({reason}); {see}"
    return f"SLURM: expected a job that it accepts, got: {reason}; --dry-run prints what was submitted"


def _explain_size(asked: Mapping[str, str], reason: str, environment: Mapping[str, str]) -> str:
    """Name what is larger than any node of the partition, where that can be seen, and list what there is."""
    command = ["sinfo", "--noheader", "--format", "%R|%D|%c|%m|%G|%l|%P"]
    rows = [line.split("|") for line in ask(command, environment).strip().splitlines() if line.count("|") == 6]
    wanted = asked.get("partition")
    of_it = [row for row in rows if (row[0] == wanted if wanted else row[6].endswith("*"))] or rows
    there = "; ".join(
        f"{name}: {nodes} nodes, {cpus} CPUs, {memory} MB, {gres}, {limit}"
        for name, nodes, cpus, memory, gres, limit, _ in of_it[:8]
    )
    tasks, cpus = (int(asked.get(name, 1)) for name in ("ntasks-per-node", "cpus-per-task"))
    too_much = []
    if of_it and all(_minutes(row[5]) < int(asked.get("time", 0)) for row in of_it):
        too_much.append(f"--timeout of {asked['time']} minutes")
    if of_it and all(int(row[2].rstrip("+")) < tasks * cpus for row in of_it):
        too_much.append(f"{tasks} processes (--ngpus) x {cpus} CPUs (--cpus-per-task) on a node")
    if of_it and sum(int(row[1]) for row in of_it) < int(asked.get("nodes", 1)):
        too_much.append(f"--nodes {asked['nodes']}")
    flags = "--ngpus, --cpus-per-task, --nodes, --timeout"
    flags += "".join(f", --{name}" for name in ("mem", "mem-per-gpu", "gres") if name in asked)
    more = f"; too much: {', '.join(too_much)}" if too_much else ""
    return f"{flags}: expected what there is ({there}), got {_of(asked, *_SIZES)} ({reason}){more}"


def _minutes(limit: str) -> float:
    """Read a time limit as sinfo prints it: D-HH:MM:SS, HH:MM:SS, MM:SS or infinite."""
    try:
        return minutes(limit if limit.count(":") == 2 else f"0:{limit}")
    except argparse.ArgumentTypeError:
        return float("inf")


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
