"""Flags of the launcher: which one, how many processes, what a SLURM job asks for, in which environment it runs.

Not their defaults on a cluster (``cluster_file.py``), not the flags of the programs (``cli.py``). Torch-free.
Read :func:`get_args_parser` first.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from dinov2_custom.cli import OverridesParser

LAUNCHERS = ("slurm", "local", "inline")
_DURATIONS = (
    r"(?P<mins>\d+)(?::(?P<secs>\d\d))?",
    r"(?P<hours>\d+):(?P<mins>\d\d):(?P<secs>\d\d)",
    r"(?P<days>\d+)-(?P<hours>\d{1,2})(?::(?P<mins>\d\d)(?::(?P<secs>\d\d))?)?",
)


def minutes(text: str | int) -> int:
    """Read a duration as sbatch does: ``2800`` (minutes), ``90:00``, ``47:30:00``, ``2-12`` or ``2-12:30:00``.

    Seconds are rounded up to minutes.
    """
    for form in _DURATIONS:
        if match := re.fullmatch(form, str(text)):
            parts = {name: int(part or 0) for name, part in match.groupdict().items()}
            hours = parts.get("days", 0) * 24 + parts.get("hours", 0)
            if whole := hours * 60 + parts.get("mins", 0) + (parts.get("secs", 0) > 0):
                return whole
    raise argparse.ArgumentTypeError(
        f"expected minutes, MM:SS, HH:MM:SS or D-HH:MM:SS, at least a minute, got {text!r}"
    )


def count(text: str | int) -> int:
    """Read a number of at least 1."""
    if not re.fullmatch(r"0*[1-9]\d*", str(text)):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def text(given: str) -> str:
    """Read text that is not empty, as an unset variable of the shell is: ``--partition "$PARTITION"``."""
    if not given.strip():
        raise argparse.ArgumentTypeError(f"expected a value, got {given!r}; leave the flag out, or set the variable")
    return given


def count_gpus(gres: str) -> int:
    """Return the GPUs of ``gpu``, ``gpu:2``, ``gpu:a100:2`` or a list of such, 0 if there are none."""
    parts = [part.split(":") for part in re.sub("gres:", "", gres).split(",")]
    return sum(int(part[-1]) if part[-1].isdecimal() else 1 for part in parts if part[0] == "gpu")


# options of sbatch that --slurm refuses, since the job's files, signals or processes depend on them -> what to use
RESERVED = dict.fromkeys(("output", "error"), "; --output-dir chooses the folder")
_GPUS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres")
RESERVED |= dict.fromkeys(_GPUS, "; take --ngpus or --gres gpu:TYPE:N")
_TASKS = ("ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-socket")
RESERVED |= dict.fromkeys(_TASKS, "; take --ngpus, the processes of a node, and --nodes")
RESERVED |= {name: f"; take --{name}" for name in ("nodes", "cpus-per-task")}
RESERVED |= {"time": "; take --timeout", "signal": "; take --signal-delay", "array": "; take --sweep KEY=VALUE,VALUE"}
RESERVED |= {"open-mode": "", "wrap": "", "test-only": "; take --dry-run", "parsable": "", "wait": ""}
# options of sbatch that are no flags of the launcher: an error says how to give them
_SBATCH = (
    "array begin bb burst-buffer chdir clusters container-image core-spec contiguous cores-per-socket cpu-freq "
    "cpus-per-gpu deadline delay-boot dependency distribution error export gpu-bind gpu-freq gres-flags hint hold "
    "licenses mail-type mail-user mem-bind mem-per-cpu mincpus network nice no-kill nodefile nodelist ntasks "
    "ntasks-per-node ntasks-per-gpu output overcommit oversubscribe priority profile propagate reboot signal "
    "spread-job switches thread-spec threads-per-core time-min tmp use-min-nodes verbose wait wckey"
).split()
_BARE = ("contiguous", "hold", "overcommit", "reboot", "spread-job", "use-min-nodes", "verbose")


def pair(text: str) -> str:
    """Read ``key=value``, or ``key`` alone, of an sbatch option without its dashes."""
    if not re.fullmatch(r"[A-Za-z][\w-]*(=.*)?", text):
        raise argparse.ArgumentTypeError(f"expected an sbatch option as key=value without dashes, got {text!r}")
    key = text.partition("=")[0].replace("_", "-")
    if key in RESERVED:
        raise argparse.ArgumentTypeError(
            f"expected an option that the job script does not set itself, got {key}{RESERVED[key]}"
        )
    return text


def sweep(text: str) -> list[str]:
    """Read ``key=value,value,...``, at least two, as overrides; commas in brackets do not part values."""
    key, _, values = text.partition("=")
    found = re.split(r",(?![^\[]*\])", values)
    if not key or len(found) < 2 or "" in found:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE,VALUE,... with two values or more, got {text!r}")
    return [f"{key}={value}" for value in found]


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
    type: Callable[[Any], Any] = text
    many: str = ""
    sbatch: str = ""
    default: Any = None
    metavar: str | None = None

    @property
    def dest(self) -> str:
        return self.flags[0].lstrip("-").replace("-", "_")


RESOURCES = (
    Option(("--nodes", "--nnodes", "-N"), "number of nodes (default: 1)", count, default=1, metavar="N"),
    Option(("--timeout", "--time", "-t"), "time limit: minutes, HH:MM:SS, ... (default: 2800)", minutes, default=2800),
    Option(("--partition", "-p"), "partition (default: the cluster's)", sbatch="partition"),
    Option(("--account", "-A"), "account that pays", sbatch="account"),
    Option(("--qos", "-q"), "quality of service", sbatch="qos"),
    Option(("--constraint",), "features that the nodes must have", sbatch="constraint"),
    Option(("--use-volta32",), "ask for nodes with the feature volta32gb", many="flag"),
    Option(("--mem",), "memory a node, such as 64G; 0: all of it", sbatch="mem"),
    Option(("--mem-per-gpu",), "memory a GPU, such as 30G", sbatch="mem-per-gpu"),
    Option(("--cpus-per-task",), "CPU cores a process (default: 10, or what the nodes have)", count, metavar="N"),
    Option(("--gres",), "generic resources such as gpu:a100:4, which also sets --ngpus", sbatch="gres"),
    Option(("--reservation",), "reservation", sbatch="reservation"),
    Option(("--exclusive",), "whole nodes, shared with nobody", many="flag"),
    Option(("--exclude",), "nodes to leave out", sbatch="exclude"),
    Option(("--job-name", "-J"), "name of the job", sbatch="job-name"),
    Option(("--comment",), "note for the scheduler and its users", sbatch="comment"),
    Option(
        ("--slurm",), "any other option of sbatch, without dashes; may be repeated", pair, "append", metavar="KEY=VALUE"
    ),
    Option(("--srun-arg",), "argument of the processes' srun; may be repeated", many="append", metavar="ARG"),
    Option(
        ("--sweep",),
        "submit a job array: a run for each value, in <output-dir>/<number>; repeated: for each combination",
        sweep,
        "append",
        metavar="KEY=VALUE,VALUE",
    ),
    Option(
        ("--signal-delay",), "seconds before the time limit at which the run saves (default: 120)", count, default=120
    ),
)
ENVIRONMENT = (
    Option(("--conda-env",), "conda environment to run in, by name or prefix", metavar="NAME|PREFIX"),
    Option(("--venv",), "virtual environment to run in", metavar="DIR"),
    Option(("--python",), "interpreter: a path, a name looked up after --modules and --setup, or a command line"),
    Option(("--container",), "image to run in, by apptainer, singularity or enroot", metavar="IMAGE"),
    Option(("--modules",), "environment modules to load first", many="+", metavar="NAME"),
    Option(("--setup",), "line of bash to run before; may be repeated", many="append", metavar="LINE"),
)
PROCESSES = Option(
    ("--ngpus", "--gpus", "--gpus-per-node"),
    "processes a node, one a GPU (default: those of --gres, 8 with SLURM, else all GPUs of this machine)",
    count,
    metavar="N",
)
CPU = Option(("--cpu",), "use no GPU, ask SLURM for none: --ngpus is the number of CPU processes", many="flag")
# what --cluster files may hold; all but the processes make SLURM the default launcher
CLUSTER_OPTIONS = {option.dest: option for option in (PROCESSES, CPU, *RESOURCES, *ENVIRONMENT)}
SLURM_DESTS = tuple(option.dest for option in (*RESOURCES, *ENVIRONMENT)) + ("cluster",)


class LaunchParser(OverridesParser):
    """An OverridesParser in which ``--modules a b key=value`` ends before the override."""

    def error(self, message: str) -> NoReturn:
        """Say how a value that begins with a dash is given, as those of ``--srun-arg`` do."""
        flag = re.fullmatch(r"argument (--[\w-]+)\S*: expected one argument", message)
        super().error(f"{message}; one that begins with a dash: {flag[1]}=--..." if flag else message)

    def _explain_flag(self, text: str) -> str:
        flag, _, value = text.partition("=")
        name = flag.lstrip("-")
        if name.replace("_", "-") == "local-rank":
            return f"{text}: unknown flag -> start with torchrun, which says it in the environment (LOCAL_RANK)"
        if name in _SBATCH:
            advice = RESERVED.get(name, f"; take --slurm {name}" + ("" if name in _BARE else f"={value or '...'}"))
            return f"{text}: not a flag of the launcher -> {advice.removeprefix('; ') or 'the job script sets it'}"
        return super()._explain_flag(text)

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
        type=text,
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
