"""Flags of the launcher: which one, how many processes, what a SLURM job asks for, in which environment it runs.

Not their defaults on a cluster (``cluster_file.py``), not the flags of the programs (``train/args.py``). Torch-free.
Read :func:`get_args_parser` first.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dinov2_custom.train.args import OverridesParser

LAUNCHERS = ("slurm", "local", "inline")


def minutes(text: str | int) -> int:
    """Read a duration: ``2800`` (minutes), ``47:30:00`` or ``2-12:00:00``; seconds are rounded up to minutes."""
    if re.fullmatch(r"\d+", str(text)) and int(text) > 0:
        return int(text)
    match = re.fullmatch(r"(?:(\d+)-(\d{1,2})(?::(\d\d)(?::(\d\d))?)?|()(\d+):(\d\d):(\d\d))", str(text))
    if not match:
        raise argparse.ArgumentTypeError(f"expected minutes, HH:MM:SS or D-HH:MM:SS, got {text!r}")
    days, hours, mins, seconds = (int(part or 0) for part in match.groups()[:4])
    if match.group(6) is not None:
        hours, mins, seconds = (int(part) for part in match.groups()[5:])
    return max(1, (days * 24 + hours) * 60 + mins + (seconds > 0))


def count(text: str | int) -> int:
    """Read a number of at least 1."""
    if not re.fullmatch(r"0*[1-9]\d*", str(text)):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


_OURS = {  # what --slurm cannot say, because the job's files, signals or processes hang on it: what can
    "output": "; --output-dir chooses the folder",
    "error": "; --output-dir chooses the folder",
    "open-mode": "",
    "signal": "; take --signal-delay",
    "array": "; submit each run with its own --output-dir",
    "wrap": "",
}


def pair(text: str) -> str:
    """Read ``key=value``, or ``key`` alone, of an sbatch option without its dashes."""
    if not re.fullmatch(r"[A-Za-z][\w-]*(=.*)?", text):
        raise argparse.ArgumentTypeError(f"expected an sbatch option as key=value without dashes, got {text!r}")
    key = text.partition("=")[0]
    if key in _OURS:
        raise argparse.ArgumentTypeError(
            f"expected an option that the job script does not set itself, got {key}{_OURS[key]}"
        )
    return text


@dataclass(frozen=True)
class Option:
    """One flag that a cluster file may set too, under the first flag's name.

    Args:
        many: ``"+"`` several values after the flag, ``"append"`` the flag several times, ``"flag"`` no value.
        sbatch: the option of sbatch that takes the value as it is.
        default: what a SLURM job gets when neither flag nor file says anything.
    """

    flags: tuple[str, ...]
    help: str
    type: Callable[[Any], Any] = str
    many: str = ""
    sbatch: str = ""
    default: Any = None
    metavar: str | None = None

    @property
    def dest(self) -> str:
        return self.flags[0].lstrip("-").replace("-", "_")


RESOURCES = (
    Option(("--nodes", "--nnodes"), "number of nodes (default: 1)", count, default=1, metavar="N"),
    Option(("--timeout",), "time limit in minutes or as HH:MM:SS (default: 2800)", minutes, default=2800),
    Option(("--partition",), "partition (default: the cluster's)", sbatch="partition"),
    Option(("--account",), "account that pays", sbatch="account"),
    Option(("--qos",), "quality of service", sbatch="qos"),
    Option(("--constraint",), "features that the nodes must have", sbatch="constraint"),
    Option(("--use-volta32",), "ask for nodes with the feature volta32gb", many="flag"),
    Option(("--mem",), "memory a node, such as 64G; 0: all of it", sbatch="mem"),
    Option(("--mem-per-gpu",), "memory a GPU, such as 30G", sbatch="mem-per-gpu"),
    Option(("--cpus-per-task",), "CPU cores a process (default: 10)", count, default=10, metavar="N"),
    Option(("--gres",), "generic resources instead of --gpus-per-node, such as gpu:a100:4", sbatch="gres"),
    Option(("--reservation",), "reservation", sbatch="reservation"),
    Option(("--exclusive",), "whole nodes, shared with nobody", many="flag"),
    Option(("--exclude",), "nodes to leave out", sbatch="exclude"),
    Option(("--comment",), "note for the scheduler and its users", sbatch="comment"),
    Option(
        ("--slurm",), "any other option of sbatch, without dashes; may be repeated", pair, "append", metavar="KEY=VALUE"
    ),
    Option(
        ("--signal-delay",), "seconds before the time limit at which the run saves (default: 120)", count, default=120
    ),
)
ENVIRONMENT = (
    Option(("--conda-env",), "conda environment to run in, by name or prefix", metavar="NAME|PREFIX"),
    Option(("--venv",), "virtual environment to run in", metavar="DIR"),
    Option(("--python",), "interpreter to run with: a path, or a name looked up after --modules and --setup"),
    Option(("--modules",), "environment modules to load first", many="+", metavar="NAME"),
    Option(("--setup",), "line of bash to run before; may be repeated", many="append", metavar="LINE"),
)
PROCESSES = Option(
    ("--ngpus", "--gpus", "--gpus-per-node"),
    "processes a node, one a GPU (default: 8 with SLURM, else all GPUs of this machine)",
    count,
    default=8,
    metavar="N",
)
CPU = Option(("--cpu",), "use no GPU, ask SLURM for none: --ngpus is the number of CPU processes", many="flag")
# what --cluster files may hold; all but the processes make SLURM the default launcher
CLUSTER_OPTIONS = {option.dest: option for option in (PROCESSES, CPU, *RESOURCES, *ENVIRONMENT)}
SLURM_DESTS = tuple(option.dest for option in (*RESOURCES, *ENVIRONMENT)) + ("cluster",)


class LaunchParser(OverridesParser):
    """An OverridesParser in which ``--modules a b key=value`` ends before the override."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as the parent does, with the values of ``--modules`` taken out before."""
        if args is None:
            return super().parse_known_args(args, namespace)
        left, modules = _without_modules(list(args))
        namespace, extras = super().parse_known_args(left, namespace)
        if "" in modules:
            self.error("argument --modules: expected at least one argument")
        if modules:
            namespace.modules = [*(namespace.modules or []), *modules]
        return namespace, extras


def _without_modules(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return (the other arguments, names after --modules; "" for a --modules without any)."""
    left: list[str] = []
    modules: list[str] = []
    position = 0
    while position < len(arguments):
        if arguments[position] == "--modules":
            start = position = position + 1
            while position < len(arguments) and not re.search(r"^-|=", arguments[position]):
                modules.append(arguments[position])
                position += 1
            if position == start:
                modules.append("")
            continue
        left.append(arguments[position])
        position += 1
    return left, modules


def get_args_parser(
    description: str | None = None, parents: Sequence[argparse.ArgumentParser] = (), add_help: bool = True
) -> LaunchParser:
    """Return the launcher's parser, with those of ``parents`` (upstream's signature).

    A flag that was not given is None: ``cluster_file.py`` fills in the cluster's values, then ``Option.default``.
    """
    epilog = next((parent.epilog for parent in parents if parent.epilog), None)
    parser = LaunchParser(description=description, parents=list(parents), add_help=add_help, epilog=epilog)
    launch = parser.add_argument_group("launcher")
    launch.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        help="slurm: submit a job; local: one process a GPU on this machine; inline: this process, under torchrun or a "
        "debugger (default: slurm if a SLURM flag is given, inline under torchrun or srun, else local)",
    )
    _add(launch, PROCESSES)
    _add(launch, CPU)
    launch.add_argument(
        "--dry-run",
        action="store_true",
        help="print job and configuration, and when SLURM would start it; submit and write nothing",
    )
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument(
        "--cluster",
        metavar="NAME|FILE",
        help="defaults of these flags: a YAML file, or its name in configs/cluster or ~/.config/dinov2_custom/cluster",
    )
    for option in RESOURCES:
        _add(slurm, option)
    environment = parser.add_argument_group("environment of a SLURM job (default: the interpreter that submits)")
    for option in ENVIRONMENT:
        _add(environment, option)
    return parser


def _add(group, option: Option) -> None:
    if option.many == "flag":
        group.add_argument(*option.flags, dest=option.dest, action="store_true", default=None, help=option.help)
        return
    how = {"action": "append"} if option.many == "append" else {"nargs": "+"} if option.many == "+" else {}
    metavar = option.metavar or option.dest.upper()
    group.add_argument(*option.flags, dest=option.dest, type=option.type, metavar=metavar, help=option.help, **how)
