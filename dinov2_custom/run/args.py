"""Flags of the launcher, and their defaults for a cluster from a YAML file, whose keys are the flags without dashes.

Without ``--cluster``, ``~/.config/dinov2_custom/cluster.yaml`` is read for SLURM jobs if it exists. Flags override the
file. Does not import torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from dinov2_custom.cli import OverridesParser
from dinov2_custom.errors import ConfigError, LaunchError

LAUNCHERS = ("slurm", "local", "inline")
DEFAULT_NGPUS = 8  # as upstream
INTERPRETERS = ("conda_env", "venv", "python", "container")
_DURATIONS = (
    r"(?P<mins>\d+)(?::(?P<secs>\d\d))?",
    r"(?P<hours>\d+):(?P<mins>\d\d):(?P<secs>\d\d)",
    r"(?P<days>\d+)-(?P<hours>\d{1,2})(?::(?P<mins>\d\d)(?::(?P<secs>\d\d))?)?",
)


def minutes(text: str | int) -> int:
    """Parse a duration as sbatch does: ``2800`` (minutes), ``90:00``, ``47:30:00``, ``2-12`` or ``2-12:30:00``.

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
    """Parse an integer of at least 1."""
    if not re.fullmatch(r"0*[1-9]\d*", str(text)):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def text(given: str) -> str:
    """Return non-empty text; empty text usually comes from an unset shell variable: ``--partition "$PARTITION"``."""
    if not given.strip():
        raise argparse.ArgumentTypeError(f"expected a value, got {given!r}; leave the flag out, or set the variable")
    return given


def srun_argument(given: str) -> str:
    """Return an argument of srun, which must begin with a dash: srun would run anything else as the command."""
    if not re.match(r"--?[A-Za-z]", text(given)):
        raise argparse.ArgumentTypeError(f"expected an argument with its dashes, such as --mpi=none, got {given!r}")
    return given


# GPUs in a list of resources: (type with colon or "", number or "")
_GPUS = re.compile(r"(?<![^,])gpu((?::[^:,()]*[^:,()\d][^:,()]*)?)(?::([1-9]\d*))?(?![^,])")


def gres(given: str) -> str:
    """Parse a list of generic resources, in which GPUs are ``gpu``, ``gpu:2``, ``gpu:a100`` or ``gpu:a100:2``."""
    for part in text(given).split(","):
        if re.match(r"(gres\W)?gpus?\b", part, re.IGNORECASE) and not _GPUS.fullmatch(part):
            raise argparse.ArgumentTypeError(
                f"expected gpu:N or gpu:TYPE:N with N of at least 1 and nothing after it, got {part!r}; for no GPUs "
                "use --cpu"
            )
    return given


def count_gpus(gres: str | None) -> int:
    """Return the number of GPUs in a list of resources."""
    return sum(int(number or 1) for _, number in _GPUS.findall(gres or ""))


# sbatch options that --slurm rejects, since the job's files, signals or processes depend on them -> what to use instead
RESERVED = dict.fromkeys(("output", "error"), "--output-dir chooses the folder")
_OF_GPUS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres")
RESERVED |= dict.fromkeys(_OF_GPUS, "use --ngpus or --gres gpu:TYPE:N")
_TASKS = ("ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-socket")
RESERVED |= dict.fromkeys(_TASKS, "use --ngpus, the processes of a node, and --nodes")
RESERVED |= {name: f"use --{name}" for name in ("nodes", "cpus-per-task")}
RESERVED |= {"time": "use --timeout", "signal": "use --signal-delay", "array": "use --sweep KEY=VALUE,VALUE"}
RESERVED |= dict.fromkeys(("open-mode", "wrap", "parsable", "wait"), "leave it out") | {"test-only": "use --dry-run"}
# sbatch options that are not flags of the launcher: an error explains how to pass them
_SBATCH = (
    "array begin bb burst-buffer chdir clusters container-image core-spec contiguous cores-per-socket cpu-freq "
    "cpus-per-gpu deadline delay-boot dependency distribution error export gpu-bind gpu-freq gpus gres-flags hint hold "
    "input licenses mail-type mail-user mem-bind mem-per-cpu mincpus network nice no-kill nodefile nodelist ntasks "
    "ntasks-per-node ntasks-per-gpu output overcommit oversubscribe priority profile propagate reboot signal "
    "spread-job switches thread-spec threads-per-core time-min tmp use-min-nodes verbose wait wckey"
).split()
_BARE = ("contiguous", "hold", "overcommit", "reboot", "spread-job", "use-min-nodes", "verbose")
_LETTERS = {"a": "array", "b": "begin", "c": "cpus-per-task", "d": "dependency", "e": "error", "i": "input"}
_LETTERS |= {"k": "no-kill", "m": "distribution", "n": "ntasks", "o": "output", "s": "oversubscribe", "v": "verbose"}
_LETTERS |= {"w": "nodelist", "x": "exclude", "C": "constraint", "D": "chdir", "F": "nodefile", "G": "gpus"}
_LETTERS |= {"H": "hold", "L": "licenses", "M": "clusters", "O": "overcommit", "S": "core-spec", "W": "wait"}


def pair(text: str) -> str:
    """Parse an sbatch option without its dashes: ``key=value`` or ``key``."""
    if not re.fullmatch(r"[A-Za-z][\w-]*(=.*)?", text):
        raise argparse.ArgumentTypeError(f"expected an sbatch option as key=value without dashes, got {text!r}")
    key = text.partition("=")[0].replace("_", "-")
    if key in RESERVED:
        raise argparse.ArgumentTypeError(
            f"expected an option that the job script does not set itself, got {key}; {RESERVED[key]}"
        )
    return text


def sweep(text: str) -> list[str]:
    """Parse ``key=value,value,...`` (at least two values) into overrides; commas inside brackets do not separate."""
    key, _, values = text.partition("=")
    found = re.split(r",(?![^\[]*\])", values)
    if not key or len(found) < 2 or "" in found:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE,VALUE,... with two values or more, got {text!r}")
    return [f"{key}={value}" for value in found]


@dataclass(frozen=True)
class Option:
    """One flag, which a cluster file may also set under the first flag's name.

    Args:
        many: ``"+"`` for several values after the flag, ``"append"`` for repeated flags (added to the file's values),
            ``"flag"`` for no value.
        sbatch: whether sbatch has an option of the same name that accepts the value unchanged.
        default: value for a SLURM job if neither flag nor file sets it.
    """

    flags: tuple[str, ...]
    help: str
    type: Callable[[Any], Any] = text
    many: str = ""
    sbatch: bool = False
    default: Any = None
    metavar: str | None = None

    @property
    def dest(self) -> str:
        return self.flags[0].lstrip("-").replace("-", "_")


RESOURCES = (
    Option(("--nodes", "--nnodes", "-N"), "number of nodes (default: 1)", count, sbatch=True, default=1),
    Option(("--timeout", "--time", "-t"), "time limit: minutes, HH:MM:SS, ... (default: 2800)", minutes, default=2800),
    Option(("--partition", "-p"), "partition (default: the cluster's)", sbatch=True),
    Option(("--account", "-A"), "account to charge", sbatch=True),
    Option(("--qos", "-q"), "quality of service", sbatch=True),
    Option(("--constraint",), "features that the nodes must have", sbatch=True),
    Option(("--use-volta32",), "request nodes with the feature volta32gb", many="flag"),
    Option(("--mem",), "memory per node, such as 64G; 0: all of it", sbatch=True),
    Option(("--mem-per-gpu",), "memory per GPU, such as 30G", sbatch=True),
    Option(("--cpus-per-task",), "CPU cores per process (default: 10, or what the nodes have)", count, sbatch=True),
    Option(("--gres",), "generic resources such as gpu:a100:4, which also sets --ngpus", gres, sbatch=True),
    Option(("--reservation",), "reservation", sbatch=True),
    Option(("--exclusive",), "allocate whole nodes, not shared with other jobs", many="flag", sbatch=True),
    Option(("--exclude",), "nodes to exclude", sbatch=True),
    Option(("--job-name", "-J"), "name of the job", sbatch=True),
    Option(("--comment",), "comment of the job", sbatch=True),
    Option(
        ("--slurm",), "any other option of sbatch, without dashes; may be repeated", pair, "append", metavar="KEY=VALUE"
    ),
    Option(("--srun-arg",), "argument of the job's srun; may be repeated", srun_argument, "append", metavar="ARG"),
    Option(
        ("--sweep",),
        "submit a job array with one run per value, in <output-dir>/<number>; if repeated, one per combination",
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
    Option(("--setup",), "line of bash to execute first; may be repeated", many="append", metavar="LINE"),
)
PROCESSES = Option(
    ("--ngpus", "--gpus", "--gpus-per-node"),
    "processes per node, one per GPU (default: as many as in --gres, else 8 with SLURM, else all GPUs of this machine)",
    count,
)
CPU = Option(("--cpu",), "use no GPU and request none; --ngpus is then the number of CPU processes", many="flag")
# options allowed in --cluster files; all except the number of processes make SLURM the default launcher
CLUSTER_OPTIONS = {option.dest: option for option in (PROCESSES, CPU, *RESOURCES, *ENVIRONMENT)}
SLURM_DESTS = tuple(option.dest for option in (*RESOURCES, *ENVIRONMENT)) + ("cluster",)
LAUNCH_DESTS = (*CLUSTER_OPTIONS, "launcher", "cluster", "dry_run")


class LaunchParser(OverridesParser):
    """An OverridesParser in which ``--modules a b key=value`` ends before the override."""

    def error(self, message: str) -> NoReturn:
        """Exit with the message, adding how to pass a value that begins with a dash, as those of ``--srun-arg`` do."""
        flag = re.fullmatch(r"argument (--[\w-]+)\S*: expected one argument", message)
        super().error(f"{message}; one that begins with a dash: {flag[1]}=--..." if flag else message)

    def _explain_flag(self, text: str) -> str:
        flag, _, value = text.partition("=")
        name = flag.lstrip("-")
        if name.replace("_", "-") == "local-rank":
            return f"{text}: unknown flag -> start with torchrun, which sets it in the environment (LOCAL_RANK)"
        is_letter = not flag.startswith("--") and name not in _SBATCH and f"--{name}" not in self._option_string_actions
        if is_letter and name[:1] in _LETTERS:  # -n 8, -n8
            name, value = _LETTERS[name[0]], value or name[1:]
        if name not in (*_SBATCH, *_LETTERS.values()):
            return super()._explain_flag(text)
        given = name if name in _BARE else f"{name}={value or '...'}"
        is_flag = f"--{name}" in self._option_string_actions
        advice = RESERVED.get(name, f"use --{given}" if is_flag else f"use --slurm {given}")
        return f"{text}: not a flag of the launcher -> {advice}"

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as the parent class does, with ``--modules=name`` for each name after ``--modules``."""
        return super().parse_known_args(args if args is None else _one_name_a_flag("--modules", args), namespace)


def _one_name_a_flag(flag: str, arguments: Sequence[str]) -> list[str]:
    found: list[str] = []
    is_name = False
    for argument in arguments:
        is_name = argument == flag or (is_name and not re.search("^-|=", argument))
        if is_name and argument != flag and found[-1] == f"{flag}=":
            found[-1] += argument
        else:
            found.append(f"{flag}={argument.removeprefix(flag)}" if is_name else argument)
    return found


def get_args_parser(
    description: str | None = None, parents: Sequence[argparse.ArgumentParser] = (), add_help: bool = True
) -> LaunchParser:
    """Return the launcher's parser, extended by ``parents`` (upstream's signature).

    A flag that was not given is None; :func:`fill_in` sets it to the cluster's value or else ``Option.default``.
    """
    epilog = next((parent.epilog for parent in parents if parent.epilog), None)
    parser = LaunchParser(description=description, parents=list(parents), add_help=add_help, epilog=epilog)
    launch = parser.add_argument_group("launcher")
    launch.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        help="slurm: submit a job; local: one process per GPU on this machine; inline: only this process, under "
        "torchrun or a debugger (default: slurm if a SLURM flag is given, inline under torchrun or srun, else local)",
    )
    _add(launch, PROCESSES, CPU)
    launch.add_argument(
        "--dry-run",
        action="store_true",
        help="print job and configuration, and when SLURM would start it; submit and write nothing",
    )
    for action in _add_slurm(parser):
        action.help = argparse.SUPPRESS
    slurm_help = "show the flags of SLURM jobs, such as --partition, and exit"
    launch.add_argument("--help-slurm", action=_SlurmHelp, nargs=0, help=slurm_help)
    return parser


def _add_slurm(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    slurm = parser.add_argument_group("SLURM")
    cluster = slurm.add_argument(
        "--cluster",
        type=text,
        metavar="NAME|FILE",
        help="defaults of these flags: a YAML file, or its name in configs/cluster or ~/.config/dinov2_custom/cluster",
    )
    of_job = parser.add_argument_group("environment of a SLURM job (default: the interpreter that submits)")
    return [cluster, *_add(slurm, *RESOURCES), *_add(of_job, *ENVIRONMENT)]


class _SlurmHelp(argparse.Action):
    """Print the flags that ``--help`` leaves out, and exit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS})

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        described = argparse.ArgumentParser(
            usage=f"{parser.prog} ... [SLURM flags]",
            description="Any of these flags submits the command as a SLURM job.",
            add_help=False,
        )
        _add_slurm(described)
        described.print_help()
        parser.exit()


def _add(group, *options: Option) -> list[argparse.Action]:
    added = []
    for option in options:
        how: dict[str, Any] = {"action": "append"} if option.many else {}
        metavar = option.metavar or ("N" if option.type is count else option.dest.upper())
        how |= {"type": option.type, "metavar": metavar}
        if option.many == "flag":
            how = {"action": "store_true"}
        added.append(group.add_argument(*option.flags, dest=option.dest, default=None, help=option.help, **how))
    return added


def fill_in(args: argparse.Namespace) -> None:
    """Set every launcher option of ``args`` that was not given, from the cluster file or else to its default.

    ``slurm`` and ``setup`` from the file precede those of the command line. There is one process per GPU; with
    ``--cpu`` no GPUs are requested.

    Raises:
        ConfigError: if there is no such file, or it has mistakes (lists all of them).
        LaunchError: if ``--ngpus`` and ``--gres`` disagree.
    """
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dinov2_custom"
    path = find(args.cluster, folder) if args.cluster else folder / "cluster.yaml"
    values = read(path) if path.is_file() else {}
    if any(getattr(args, name) for name in INTERPRETERS):  # the command line replaces the file's environment
        values = {dest: value for dest, value in values.items() if dest not in INTERPRETERS}
    if count_gpus(args.gres):
        values.pop("ngpus", None)
    elif args.ngpus and values.get("gres"):
        values["gres"] = _GPUS.sub(rf"gpu\1:{args.ngpus}", values["gres"])
    for dest, option in CLUSTER_OPTIONS.items():
        given, kept = getattr(args, dest, None), values.get(dest)
        if option.many == "append":
            setattr(args, dest, [*(kept or []), *(given or [])])
        elif given is None:
            setattr(args, dest, option.default if kept is None else kept)
    if args.cpu and args.gres:
        args.gres = ",".join(part for part in args.gres.split(",") if not count_gpus(part))
    gpus = count_gpus(args.gres)
    if gpus and args.ngpus not in (None, gpus):
        raise LaunchError(
            f"--ngpus, --gres: expected as many processes per node as GPUs, got {args.ngpus} and {args.gres}; leave "
            "out --ngpus"
        )
    args.ngpus = args.ngpus or gpus or DEFAULT_NGPUS


_NOTHING = ("", "null", "~")


def find(name: str, user_folder: Path) -> Path:
    """Return the file selected by ``--cluster name``.

    Raises:
        ConfigError: if there is none; lists the available names.
    """
    from dinov2_custom.configs.load import recipe_folder  # slow to import, for omegaconf

    if os.sep in name or name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser().absolute()
        if path.is_file():
            return path
        raise ConfigError(f"--cluster: expected a YAML file, got nothing at {path}; check the path")
    folders = [user_folder / "cluster", recipe_folder() / "cluster"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(
        f"--cluster: expected one of {', '.join(known) or '(there are none)'}, or a YAML file, got {name!r}; write "
        f"{folders[0] / name}.yaml with one flag a line, such as `partition: gpu`"
    )


def read(path: Path) -> dict[str, Any]:
    """Return the options in ``path`` by their names in the parsed arguments.

    Raises:
        ConfigError: if the file is unreadable, or has unknown keys or values invalid for the flag (lists all of them).
    """
    import yaml

    try:  # BaseLoader keeps all values as text, as on a command line; otherwise 47:30:00 is a base-60 number
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"{path}: expected YAML, got {' '.join(str(e).split())}; fix the file") from e
    if content and not isinstance(content, dict):
        raise ConfigError(f"{path}: expected `flag: value` lines, got {type(content).__name__}; fix the file")
    known = {flag[2:]: option for option in CLUSTER_OPTIONS.values() for flag in option.flags if flag[:2] == "--"}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in (content or {}).items():
        option = known.get(str(key).replace("_", "-"))
        if option is None:
            near = difflib.get_close_matches(str(key), known, n=1)
            problems.append(
                f"{key}: expected a launcher flag -> " + (f"did you mean {near[0]}?" if near else "see --help-slurm")
            )
            continue
        try:
            values[option.dest] = None if value in _NOTHING else _value(option, value)
        except (argparse.ArgumentTypeError, ValueError) as e:
            problems.append(f"{key}: {e}")
    if problems:
        raise ConfigError("\n  ".join([f"{path}: cannot use these lines:", *problems]))
    return values


def _value(option: Option, value: Any) -> Any:
    if option.many == "flag":
        if str(value).lower() not in ("true", "false"):
            raise ValueError(f"expected true or false, got {value!r}")
        return value.lower() == "true"
    if option.dest == "slurm" and isinstance(value, dict):
        value = [_sbatch(name, given) for name, given in value.items() if given not in _NOTHING]
    if option.many and isinstance(value, list):
        return [_value(replace(option, many=""), item) for item in value]
    if isinstance(value, (dict, list)):
        raise ValueError(f"expected one value, got {value!r}")
    return [option.type(value)] if option.many else option.type(value)


def _sbatch(name: str, given: Any) -> str:
    """Return the option in the form accepted by ``--slurm``; lists are joined with commas."""
    if isinstance(given, list) and all(isinstance(item, str) for item in given):
        given = ",".join(given)
    if not isinstance(given, str) or given == "false":
        raise ValueError(f"expected a value or true for {name}, got {given!r}; leave out what sbatch should not get")
    return name if given == "true" else f"{name}={given}"
