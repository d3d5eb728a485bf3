"""Defaults of a cluster from a YAML file: the launcher's flags without their dashes.

Without ``--cluster`` the user's own ``~/.config/dinov2_custom/cluster.yaml`` is read for SLURM jobs, if there is one. A
flag wins over the file. Torch-free. Read :func:`resolve` first.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinov2_custom.errors import ConfigError, LaunchError
from dinov2_custom.run.args import CLUSTER_OPTIONS, Option, count_gpus

USER_FILE = "cluster.yaml"
DEFAULT_NGPUS = 8  # as upstream
INTERPRETERS = ("conda_env", "venv", "python", "container")
_NOTHING = ("", "null", "~")


def resolve(args: argparse.Namespace) -> None:
    """Do :func:`fill_in`, and have as many processes a node as GPUs, and neither with ``--cpu`` ask for any.

    Raises:
        LaunchError: ``--ngpus`` and ``--gres`` disagree.
    """
    given = bool(args.ngpus), bool(args.gres)
    fill_in(args)
    asked = count_gpus(args.gres or "")
    if args.cpu and asked:
        args.gres, asked = ",".join(part for part in args.gres.split(",") if not count_gpus(part)), 0
    if asked and args.ngpus and args.ngpus != asked:
        if given == (True, False):
            args.gres = re.sub(r"\b(gpu(?::[^:,]*[^:,\d][^:,]*)?)(?::\d+)?(?=,|$)", rf"\1:{args.ngpus}", args.gres)
        elif given == (False, True):
            args.ngpus = asked
        else:
            raise LaunchError(
                f"--ngpus, --gres: expected as many processes a node as GPUs, got {args.ngpus} and {args.gres}; leave "
                "out --ngpus"
            )
    args.ngpus = args.ngpus or asked or DEFAULT_NGPUS


def fill_in(args: argparse.Namespace) -> None:
    """Set every launcher option of ``args`` that was not given: from the cluster file, else its default.

    ``slurm`` and ``setup`` of the file stand before those of the command line.

    Raises:
        ConfigError: no such file, or every mistake in it at once.
    """
    folder = _user_folder()
    path = find(args.cluster, folder) if args.cluster else folder / USER_FILE
    values = read(path) if path.is_file() else {}
    if any(getattr(args, name) for name in INTERPRETERS):  # another environment than the file's
        values = {dest: value for dest, value in values.items() if dest not in INTERPRETERS}
    for dest, option in CLUSTER_OPTIONS.items():
        given, kept = getattr(args, dest, None), values.get(dest)
        if option.many == "append":
            setattr(args, dest, [*(kept or []), *(given or [])])
        elif given is None:
            setattr(args, dest, option.default if kept is None else kept)


def _user_folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dinov2_custom"


def find(name: str, user_folder: Path) -> Path:
    """Return the file that ``--cluster name`` means.

    Raises:
        ConfigError: there is none; lists the names there are.
    """
    if os.sep in name or name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser().absolute()
        if path.is_file():
            return path
        raise ConfigError(f"--cluster: expected a YAML file, got nothing at {path}; check the path")
    folders = [user_folder / "cluster", Path(__file__).resolve().parents[2] / "configs" / "cluster"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(
        f"--cluster: expected one of {', '.join(known) or '(none is there)'}, or a YAML file, got {name!r}; write "
        f"{folders[0] / name}.yaml with one flag a line, such as `partition: gpu`"
    )


def read(path: Path) -> dict[str, Any]:
    """Return the options of ``path`` by their names in the parsed arguments.

    Raises:
        ConfigError: unreadable, unknown keys or values that the flag would refuse, all of them at once.
    """
    import yaml

    try:  # BaseLoader: all values are text, as on a command line; 47:30:00 is not a number of base 60
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"{path}: expected YAML, got {' '.join(str(e).split())}; fix the file") from e
    if content and not isinstance(content, dict):
        raise ConfigError(f"{path}: expected `flag: value` lines, got {type(content).__name__}; fix the file")
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in (content or {}).items():
        dest = _dest(str(key))
        if dest is None:
            near = difflib.get_close_matches(str(key), _names(), n=1)
            problems.append(
                f"{key}: expected a launcher flag -> " + (f"did you mean {near[0]}?" if near else "see --help")
            )
            continue
        try:
            values[dest] = None if value in _NOTHING else _value(CLUSTER_OPTIONS[dest], value)
        except (argparse.ArgumentTypeError, ValueError) as e:
            problems.append(f"{key}: {e}")
    if problems:
        raise ConfigError("\n  ".join([f"{path}: cannot use these lines:", *problems]))
    return values


def _names() -> list[str]:
    return [flag[2:] for option in CLUSTER_OPTIONS.values() for flag in option.flags if flag.startswith("--")]


def _dest(key: str) -> str | None:
    wanted = key.replace("_", "-")
    return next((dest for dest, option in CLUSTER_OPTIONS.items() if f"--{wanted}" in option.flags), None)


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
    """Return the option as ``--slurm`` takes it; a list has commas there."""
    if isinstance(given, list) and all(isinstance(item, str) for item in given):
        given = ",".join(given)
    if not isinstance(given, str) or given == "false":
        raise ValueError(f"expected a value or true for {name}, got {given!r}; leave out what sbatch should not get")
    return name if given == "true" else f"{name}={given}"
