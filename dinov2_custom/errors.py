"""Exit codes, user-fixable errors, messages for missing packages, and the remedies that they give.

Any other exception is a bug of this package. Messages state what was expected, what was found, where (file, key or
path) and what to do. The exit codes, for shells, launchers and schedulers:

=========  ==================================================================================================
0          done, or nothing to do
1          an error that needs attention; a one-line message or a traceback is in the log
2          an invalid command line
3          the run has collapsed and train.on_collapse is stop; saved first. Nothing restarts it
75         a process of the job (or this one) died or hangs; the same command resumes from the newest checkpoint
128 + n    stopped by signal n: 130 SIGINT, 143 SIGTERM, 138 SIGUSR1, 140 SIGUSR2; in training, saved first
=========  ==================================================================================================
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import sys
from pathlib import Path
from types import ModuleType

DONE = 0
ERROR = 1
USAGE = 2
COLLAPSED = 3
LOST_PROCESS = 75  # sysexits.h calls it EX_TEMPFAIL: try again
# exit codes, as Python reports them, of a child that ended because another one did: it lost it, or a launcher stopped
# it
CONSEQUENCES = (LOST_PROCESS, -signal.SIGTERM)
# a user's Ctrl-C, a kill, and the signals that schedulers send some minutes before they reclaim a node
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


def stopped_by(signum: int) -> int:
    """Return the exit code of a run stopped by signal ``signum``."""
    return 128 + signum


def to_shell_code(code: int) -> int:
    """Return ``code``, with Python's negative code for a child killed by a signal converted to 128 + signal."""
    return code if code >= 0 else stopped_by(-code)


def should_restart(code: int) -> bool:
    """Return whether restarting the same command automatically is useful.

    True after a preemption, a kill or a lost process; False after success, a user error or Ctrl-C.
    """
    code = to_shell_code(code)
    return code == LOST_PROCESS or (code > 128 and code != stopped_by(signal.SIGINT))


class DINOv2Error(Exception):
    """Base of all errors that the user, not the developer, can fix.

    Attributes:
        exit_code: exit code of the script (:data:`LOST_PROCESS`); None for the usual one after an error.
    """

    exit_code: int | None = None


class ConfigError(DINOv2Error):
    """A configuration key, type, value or combination that cannot work."""


class DataError(DINOv2Error):
    """A dataset that is missing, empty or too broken to train on."""


class UnreadableImageError(DataError, RuntimeError):
    """One image that cannot be read or decoded; also a RuntimeError, as upstream's datasets raise."""


class CheckpointError(DINOv2Error):
    """A checkpoint or weight file that is missing, torn or of another architecture."""


class LaunchError(DINOv2Error):
    """A job that cannot be started as asked."""


class LostProcessError(LaunchError):
    """Another process of the job has died."""

    exit_code = LOST_PROCESS


class ResourceError(DINOv2Error):
    """Too little memory, or too low a limit on open files."""


class NumericsError(DINOv2Error):
    """A loss or gradient that stayed non-finite, or a collapsed run."""


_SHORTAGES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close programs that hold many files open",
    errno.ENOMEM: "use fewer processes, train.num_workers or --workers, or more memory",
}


def shortage(error: BaseException, what: str) -> ResourceError | None:
    """Return the error to raise if ``error`` is caused by this process and not by ``what`` it read, else None.

    A process without memory or file descriptors fails on every file, which says nothing about the files.
    """
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if number not in _SHORTAGES:
        return None
    return ResourceError(
        f"expected memory and free file descriptors to read {what}, got {os.strerror(number)}; {_SHORTAGES[number]}"
    )


_SOURCE_PLACE = re.compile(r"\[[^\s\]]+\.\w+:\d+\]\s*")
_GLOOS_ADVICE = " This is typically caused by a remote worker"  # the rest lists crashes, hangs, application bugs


def reason_of(error: BaseException | str) -> str:
    """Return the first line of ``error``, without torch's additions for developers.

    Removed are the C++ source location, and gloo's advice on crashed workers, which callers replace.
    """
    line = str(error).partition("\n")[0].partition(_GLOOS_ADVICE)[0]
    return _SOURCE_PLACE.sub("", line).strip().removesuffix(".")


_REMEDIES = {
    "make room": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "have the file system mounted for writing, or choose another directory": (errno.EROFS,),
    "allow it (owner, permissions), or choose another directory": (errno.EACCES, errno.EPERM),
    "put the directory back": (errno.ENOENT, errno.ENOTDIR),
    "have the file system repaired (disk, network, mount)": (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),
}


def remedy(reason: str) -> str:
    """Return what to do, as a command, about a file that could not be written for ``reason``, a system message."""
    return next(
        (what for what, codes in _REMEDIES.items() if any(os.strerror(c) in reason for c in codes)), "fix that"
    )


# packages that only some users need

OF_EXTRA = {  # module -> (its package, the extra in pyproject.toml that brings it)
    "accelerate": ("accelerate", "decoder"),
    "fvcore": ("fvcore", "fvcore"),
    "huggingface_hub": ("huggingface_hub", "export"),
    "imagecodecs": ("imagecodecs", "slides"),
    "matplotlib": ("matplotlib", "plots"),
    "mlflow": ("mlflow-skinny", "mlflow"),
    "onnx": ("onnx", "export"),
    "onnxscript": ("onnxscript", "export"),
    "pyarrow": ("pyarrow", "parquet"),
    "pycocotools": ("pycocotools", "decoder"),
    "scipy": ("scipy", "decoder"),
    "simplejpeg": ("simplejpeg", "fast"),
    "skimage": ("scikit-image", "quickstart"),
    "sklearn": ("scikit-learn", "eval"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "tifffile": ("tifffile", "slides"),
    "wandb": ("wandb", "wandb"),
}


def optional(name: str, purpose: str, error: type[DINOv2Error] = ConfigError, otherwise: str = "") -> ModuleType:
    """Import and return module ``name``, in or below a key of ``OF_EXTRA``.

    Args:
        purpose: what needs it; begins the sentence.
        otherwise: what to do instead; ends the sentence.

    Raises:
        DINOv2Error: of class ``error``, if it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise error(missing(name, purpose, otherwise, f"got none ({e})")) from e


def class_of_torchvision(module: str, name: str, otherwise: type) -> type:
    """Return torchvision's class, so that users' ``isinstance`` checks hold; ``otherwise`` without torchvision.

    Only the class identity is used. A torchvision built for another torch counts as missing.
    """
    try:
        return getattr(importlib.import_module(f"torchvision.{module}"), name)
    except (ImportError, OSError, RuntimeError):
        return otherwise


def missing(name: str, purpose: str, otherwise: str = "", got: str = "got none") -> str:
    """Return a message that ``purpose`` lacks module ``name``, with the remedy."""
    package = OF_EXTRA[name.partition(".")[0]][0]
    return f"{purpose}: expected the package {package}, {got}; {install(name)}{otherwise and f', or {otherwise}'}"


def install(name: str) -> str:
    """Return the command that installs module ``name`` into the environment of this package."""
    return f"pip install 'dinov2_custom[{OF_EXTRA[name.partition('.')[0]][1]}]'"


# what a user can type: the scripts of a checkout, or without one the equivalent commands of the package


CONSOLE_SCRIPT = "dinov2-custom"  # [project.scripts] of pyproject.toml


def command(script: str) -> str:
    """Return the command for ``script`` in the form that started this process.

    If that was none of the three forms, as in a notebook: the script if the current directory has it, else the
    package's command. All take the same arguments (``cli.COMMANDS``).
    """
    path = Path(script)
    name = command_name(script)
    if Path(sys.argv[0]).stem == CONSOLE_SCRIPT:
        return f"{CONSOLE_SCRIPT} {name}"
    if path.is_file() and sys.argv[0] != "-m":  # which __main__.py sets
        return f"python {script}"
    return f"python -m dinov2_custom {name}"


def command_name(script: str) -> str:
    """Return the command of the package for ``script``: train for run/train/train.py, decode-train in run/decoder."""
    path = Path(script)
    return f"decode-{path.stem}" if path.parent.name == "decoder" else path.stem


def small_recipe(recipe: str = "configs/vits.yaml") -> str:
    """Return the argument that selects ``recipe``: its path if the current directory has it, else its name."""
    return f"--config-file {recipe if Path(recipe).is_file() else Path(recipe).name}"


def list_of_keys() -> str:
    """Return where all configuration keys are documented: the page, or the command that prints it."""
    page = "docs/configuration.md"
    return page if Path(page).is_file() else "`python -m dinov2_custom.configs.document`"
