"""What goes wrong: exit codes, the errors a user can fix, packages that are not installed, and what to do about it.

Any other exception is a bug of this package. Every message says what was expected, what was found, where (file, key or
path) and what to do about it. What a process of ours ends with, for shells, launchers and schedulers:

=========  ==================================================================================================
0          done, or nothing to do
1          a mistake or fault that a person has to look at; one line of error, or a traceback, is in the log
2          a command line that cannot be understood
75         a process of the job is gone or hangs (this one too); the same command goes on from the newest checkpoint
128 + n    asked to stop by signal n: 130 SIGINT, 143 SIGTERM, 138 SIGUSR1, 140 SIGUSR2; in training, saved first
=========  ==================================================================================================
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
from types import ModuleType

DONE = 0
ERROR = 1
USAGE = 2
LOST_PROCESS = 75  # sysexits.h calls it EX_TEMPFAIL: try again
# what a child ends with, as Python has it, because another one did: it lost that one, or a launcher stopped it
CONSEQUENCES = (LOST_PROCESS, -signal.SIGTERM)
# a user's Ctrl-C, a kill, and what schedulers send some minutes before they take a node away
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


def stopped_by(signum: int) -> int:
    """Return the exit code of a run that signal ``signum`` asked to stop."""
    return 128 + signum


def to_shell_code(code: int) -> int:
    """Return ``code``, where Python's for a child killed by a signal, which is negative, becomes 128 + signal."""
    return code if code >= 0 else stopped_by(-code)


def should_restart(code: int) -> bool:
    """Return whether the same command, started again by a machine, has work to do and a chance to do it.

    So after a preemption, a kill and a lost process; not after the end, a mistake, or a person's Ctrl-C.
    """
    code = to_shell_code(code)
    return code == LOST_PROCESS or (code > 128 and code != stopped_by(signal.SIGINT))


class DINOv2Error(Exception):
    """Base of all errors that the user, not the developer, can fix.

    Attributes:
        exit_code: what a script ends with (:data:`LOST_PROCESS`); None: as it does after any error.
    """

    exit_code: int | None = None


class ConfigError(DINOv2Error):
    """A configuration key, type, value or combination that cannot work."""


class DataError(DINOv2Error):
    """A dataset that is missing, empty or too broken to train on."""


class UnreadableImageError(DataError, RuntimeError):
    """One image that cannot be read or decoded; a RuntimeError too, which upstream's datasets raise then."""


class CheckpointError(DINOv2Error):
    """A checkpoint or weight file that is missing, torn or of another architecture."""


class LaunchError(DINOv2Error):
    """A job that cannot be started as asked."""


class LostProcessError(LaunchError):
    """Another process of the job that is gone."""

    exit_code = LOST_PROCESS


class ResourceError(DINOv2Error):
    """Too little memory, or too few open files, for what was asked for."""


class NumericsError(DINOv2Error):
    """A loss or gradient that stayed non-finite, or a collapsed run."""


_SHORTAGES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close programs that hold many files open",
    errno.ENOMEM: "use fewer processes, train.num_workers or --workers, or more memory",
}


def shortage(error: BaseException, what: str) -> ResourceError | None:
    """Return the error to raise where ``error`` is about this process and not about ``what`` it read, else None.

    A process without memory or file descriptors fails on every file; none of them is bad for that.
    """
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if number not in _SHORTAGES:
        return None
    return ResourceError(
        f"expected memory and free file descriptors to read {what}, got {os.strerror(number)}; {_SHORTAGES[number]}"
    )


_SOURCE_PLACE = re.compile(r"\[[^\s\]]+\.\w+:\d+\]\s*")
_GLOOS_ADVICE = " This is typically caused by a remote worker crashing"


def reason_of(error: BaseException) -> str:
    """Return the first line of ``error``, without what torch's C++ adds for its developers.

    That is the place in the source tree it was built from, and gloo's advice on crashed workers, which callers replace.
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
    """Return what to do, as a command, about a file that could not be written for ``reason``, the system's words."""
    return next(
        (what for what, codes in _REMEDIES.items() if any(os.strerror(c) in reason for c in codes)), "fix that"
    )


# packages that only some users need

OF_EXTRA = {  # module -> (its package, the extra in pyproject.toml that brings it)
    "fvcore": ("fvcore", "fvcore"),
    "imagecodecs": ("imagecodecs", "slides"),
    "iopath": ("iopath", "iopath"),
    "matplotlib": ("matplotlib", "plots"),
    "onnx": ("onnx", "export"),
    "onnxscript": ("onnxscript", "export"),
    "pyarrow": ("pyarrow", "parquet"),
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
        purpose: what needs it, the beginning of the sentence.
        otherwise: what to do instead, its end.

    Raises:
        DINOv2Error: of class ``error``, when it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise error(missing(name, purpose, otherwise, f"got none ({e})")) from e


def class_of_torchvision(module: str, name: str, otherwise: type) -> type:
    """Return torchvision's class, for ours to be told by users' ``isinstance``; ``otherwise`` without torchvision.

    Nothing of it is used. A torchvision that was built for another torch is like none.
    """
    try:
        return getattr(importlib.import_module(f"torchvision.{module}"), name)
    except (ImportError, OSError, RuntimeError):
        return otherwise


def missing(name: str, purpose: str, otherwise: str = "", got: str = "got none") -> str:
    """Return the sentence for ``purpose`` without module ``name``, and what to do."""
    package = OF_EXTRA[name.partition(".")[0]][0]
    return f"{purpose}: expected the package {package}, {got}; {install(name)}{otherwise and f', or {otherwise}'}"


def install(name: str) -> str:
    """Return the command that installs module ``name`` where this package is installed already."""
    return f"pip install 'dinov2_custom[{OF_EXTRA[name.partition('.')[0]][1]}]'"
