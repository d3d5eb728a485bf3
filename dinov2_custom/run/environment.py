"""The software environment requested for a job: bash lines that set it up, and the expected interpreter.

The order is modules, setup lines, conda or venv, so that the environment's interpreter comes first on PATH. Whatever
can be checked is checked at submission; ``environment_check.py`` checks again on every node. Does not import torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinov2_custom.entry import REQUIREMENTS
from dinov2_custom.errors import LaunchError
from dinov2_custom.run.args import INTERPRETERS

# any Python 3 can parse this, so that an old one reports its version instead of a syntax error
_IMPORT = """
import sys
if sys.version_info < (3, 10):
    sys.exit("Python %d.%d, which is too old: 3.10 or later" % sys.version_info[:2])
import importlib.util
from dinov2_custom.entry import REQUIREMENTS
print(*[name for name in REQUIREMENTS if importlib.util.find_spec(name) is None])
"""
_MODULE_INIT = (
    '"$MODULESHOME/init/bash" "$LMOD_PKG/init/bash" /etc/profile.d/modules.sh /etc/profile.d/lmod.sh '
    "/etc/profile.d/z00_lmod.sh /usr/share/lmod/lmod/init/bash /usr/share/modules/init/bash"
)

# enroot forwards only the variables named; this machine's PATH and similar are wrong inside an image
_ENROOT = (
    'for name in $(compgen -e); do case $name in *PATH | PYTHON* | HOME | SHELL | *PWD | _) ;; *) set -- --env "$name" '
    '"$@" ;; esac; done; exec "$0" start "$@"'
)


@dataclass(frozen=True)
class Environment:
    """Bash ``lines``, each with a description of the step, and the ``python`` command as words of bash source.

    Args:
        prefix: required sys.prefix of the interpreter; "" for any.
        executable: required sys.executable; "" for any.
        missing: packages needed by all tasks that this environment lacks, as far as this machine can determine.
    """

    lines: tuple[tuple[str, str], ...]
    python: str
    prefix: str = ""
    executable: str = ""
    missing: tuple[str, ...] = ()


def resolve(args: argparse.Namespace, environment: Mapping[str, str]) -> Environment:
    """Return the environment requested by the flags.

    Raises:
        LaunchError: if two environments are requested, or one that does not exist or lacks this package.
    """
    chosen = {f"--{name.replace('_', '-')}": getattr(args, name) for name in INTERPRETERS if getattr(args, name)}
    if len(chosen) > 1:
        raise LaunchError(f"expected one of {', '.join(chosen)}, got {len(chosen)} of them; leave the others out")
    flag, given = next(iter(chosen.items()), ("", ""))
    lines = _module_lines(args.modules or []) + [(f"--setup {line}", line) for line in args.setup or []]
    if flag in ("--conda-env", "--venv"):
        prefix = conda_prefix(given, environment) if args.conda_env else _path(flag, given)
        python = prefix / "bin" / "python"
        if not os.access(python, os.X_OK):
            raise LaunchError(f"{flag}: expected an environment with bin/python, got none at {prefix}; check the path")
        missing = _find_missing(flag, python, run=not lines)
        activate = [f"source {shlex.quote(str(prefix / 'bin' / 'activate'))}"] if args.venv else _conda_lines(prefix)
        lines += [(f"activating {prefix}", line) for line in activate]
        return Environment(tuple(lines), shlex.quote(str(python)), str(prefix), missing=missing)
    if args.container:
        image = _expand(flag, given)
        return Environment((*lines, *_container_lines(image, args.output_dir)), '"${container[@]}" python3')
    if args.python and " " in given and not _path(flag, given).exists():
        try:
            words = [_expand(flag, word) for word in shlex.split(given)]
        except ValueError as e:
            raise LaunchError(f"--python: expected a path or a command line, got {given!r}: {e}") from e
        return Environment(tuple(lines), shlex.join(words))
    if args.python and os.sep in given:
        python = _path(flag, given)
        if not os.access(python, os.X_OK):
            raise LaunchError(f"--python: expected an interpreter, got nothing that can be run at {python}")
        missing = _find_missing(flag, python, run=not lines)
        return Environment(tuple(lines), shlex.quote(str(python)), executable=str(python), missing=missing)
    if args.python:
        return Environment(tuple(lines), f'"$(command -v {shlex.quote(given)} || true)"')
    own = Environment(tuple(lines), shlex.quote(sys.executable), sys.prefix, sys.executable)
    if not lines:
        return own
    # if modules or setup lines put another Python first on PATH, that one is used
    found = f'"$([ "$(command -v python3 || true)" = "$python_before" ] && echo {own.python} || command -v python3)"'
    return Environment((("", "python_before=$(command -v python3 || true)"), *lines), found)


def _expand(flag: str, text: str) -> str:
    """Expand ``~`` and variables in ``text`` as the submitting shell would; a cluster file has no shell."""
    expanded = os.path.expanduser(os.path.expandvars(text))
    if unset := re.search(r"\$(\w+|\{[^}]*\}?)", expanded):
        raise LaunchError(f"{flag}: expected variables that this shell has set, got {unset[0]} in {text}")
    return expanded


def _path(flag: str, text: str) -> Path:
    return Path(_expand(flag, text)).absolute()


def conda_prefix(name: str, environment: Mapping[str, str]) -> Path:
    """Return the folder of the conda environment ``name``, which may also be a folder.

    Raises:
        LaunchError: if there is none of that name where conda keeps and lists environments.
    """
    if re.search(r"/|^[~.$]", name):
        return _path("--conda-env", name)
    made = Path(environment.get("HOME") or Path.home()) / ".conda" / "environments.txt"  # all created by this user
    paths = [Path(line) for line in made.read_text().splitlines() if line.strip()] if made.is_file() else []
    command = environment.get("CONDA_EXE") or shutil.which("conda", path=environment.get("PATH", ""))
    bases = [Path(command).resolve().parents[1]] if command else []
    bases += [Path(environment[name]) for name in ("CONDA_PREFIX", "MAMBA_ROOT_PREFIX") if environment.get(name)]
    roots = [Path(root) for root in environment.get("CONDA_ENVS_PATH", "").split(os.pathsep) if root]
    roots += [root for base in bases for root in (base / "envs", base.parent) if root.name == "envs"]
    paths += [path for root in roots if root.is_dir() for path in sorted(root.iterdir())]
    known = [(path.name, path) for path in paths] + [("base", base) for base in bases]
    for known_name, path in known:
        if known_name == name and (path / "conda-meta").is_dir():
            return path
    names = ", ".join(sorted({known_name for known_name, _ in known}))
    raise LaunchError(
        f"--conda-env: expected the name of a conda environment ({names or 'none was found'}), got {name!r}; give its "
        "folder instead, as `conda env list` prints it"
    )


def _conda_lines(prefix: Path) -> list[str]:
    """Return lines equivalent to ``conda activate`` that do not need conda, which compute nodes may lack."""
    quoted = shlex.quote(str(prefix))
    lines = [
        f'export CONDA_PREFIX={quoted} CONDA_DEFAULT_ENV={quoted} CONDA_SHLVL=1 PATH={quoted}/bin:"$PATH"',
        "unset PYTHONHOME VIRTUAL_ENV",
    ]
    state = prefix / "conda-meta" / "state"
    if state.is_file():
        for name, value in json.loads(state.read_text()).get("env_vars", {}).items():
            lines.append(f"export {name}={shlex.quote(str(value))}")
    lines.append(f'for hook in {quoted}/etc/conda/activate.d/*.sh; do [ ! -r "$hook" ] || source "$hook" || true; done')
    return lines


def _module_lines(names: list[str]) -> list[tuple[str, str]]:
    if not names:
        return []
    load = f"module load {shlex.join(names)}"
    find = (
        f"type module >/dev/null 2>&1 || for init in {_MODULE_INIT}; do\n"
        '  if [ -r "$init" ]; then source "$init"; break; fi\ndone'
    )
    lines = [
        ("--modules: finding the command `module`", find),
        ("--modules: finding the command `module`", "type module >/dev/null"),
    ]
    lines.append((load, load))
    for name in names:  # old versions of module always return 0
        lines.append((load, f'[[ ":$LOADEDMODULES:" == *:{shlex.quote(name)}[:/]* ]]'))
    return lines


def _container_lines(image: str, output_dir: str) -> list[tuple[str, str]]:
    """Set ``container`` to the words that run a command in ``image``, with this package and the run directory."""
    package = str(Path(__file__).resolve().parents[2])
    before, job, _ = output_dir.partition("%j")
    folders = dict.fromkeys((package, before.rpartition(os.sep)[0] if job else before))
    binds = " ".join(f"--bind {shlex.quote(folder)}" for folder in folders)
    mounts = " ".join(f"--mount {shlex.quote(f'{folder}:{folder}')}" for folder in folders)
    quoted, nothing = shlex.quote(image), "no apptainer, singularity or enroot is on PATH"
    find = (
        "if tool=$(command -v apptainer || command -v singularity); then\n"
        f'  container=("$tool" exec --nv {binds} --env PYTHONPATH={shlex.quote(package)} {quoted})\n'
        "elif tool=$(command -v enroot); then\n"
        f"  container=(bash -c {shlex.quote(_ENROOT)} "
        f'"$tool" {mounts} --env PYTHONPATH={shlex.quote(package)} {quoted})\n'
        f"else step={shlex.quote(nothing)}; false; fi"
    )
    return [(f"--container {image}", find)]


def _find_missing(flag: str, python: Path, run: bool) -> tuple[str, ...]:
    """Return the packages that ``python`` lacks; ``run``: whether it works without modules and setup lines."""
    if not run:
        return ()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    tried = subprocess.run([python, "-c", _IMPORT], capture_output=True, text=True, env=clean)
    if tried.returncode:
        reason = (tried.stderr.strip().splitlines() or ["no output"])[-1]
        if "too old" in reason:
            version = reason.partition(",")[0]
            raise LaunchError(f"{flag}: expected Python 3.10 or later, got {python}: {version} is too old")
        raise LaunchError(
            f"{flag}: expected an environment with dinov2_custom, got from {python}: {reason}; install it with "
            f"`{python} -m pip install -e {Path(__file__).resolve().parents[2]}`"
        )
    return tuple(name for name in tried.stdout.split() if name in REQUIREMENTS)
