"""The errors a user can meet. Everything else that is raised is a bug of this package.

Every message says what was expected, what was found, where (file, key or path) and what to do about it.
"""

import errno
import os
import re

from dinov2_custom.exit_codes import LOST_PROCESS


class DINOv2Error(Exception):
    """Base of all errors that the user, not the developer, can fix.

    Attributes:
        exit_code: what a script ends with, see ``exit_codes``; None: as it does after any error.
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
_GLOOS_ADVICE = " This is typically caused by a remote worker"  # crashing, or hanging or bugs in the application


def reason_of(error: BaseException | str) -> str:
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
