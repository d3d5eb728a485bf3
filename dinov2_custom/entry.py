"""How every script in ``run/`` ends: its main function's exit code, or one line of error. Imports no torch itself."""

from __future__ import annotations

import atexit
import errno
import importlib
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

from dinov2_custom.errors import ERROR, DINOv2Error, remedy, stopped_by
from dinov2_custom.world import world_from_environment

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
REQUIREMENTS = (
    *("torch", "numpy", "PIL", "omegaconf", "yaml", "safetensors", "torchmetrics", "tqdm", "submitit"),
    "filelock",
)


def run(module: str, args: Any, *, error_code: int = ERROR, quiet_threads: bool = False) -> int:
    """Import ``module``, call its ``main(args)`` and return the exit code; ``error_code`` after a DINOv2Error.

    Ctrl-C ends it without a traceback, wherever it strikes.

    ``quiet_threads``: compute threads sleep while they wait. Spinning ones slow a CPU run tenfold when data loading
    shares the cores. Torch reads this when it is imported, so it has to be set here.
    """
    if quiet_threads:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return reported(lambda: import_quietly(module).main(args), error_code=error_code)


def reported(main: Callable[[], int], *, error_code: int = ERROR) -> int:
    """Call ``main`` and return its exit code; ``error_code``, after one line, when it raises a DINOv2Error.

    The same where a disk is full, over quota or read-only: any write may meet that. Any other error is raised, or in
    one of several processes, which Python must not take apart (see :func:`leave`), printed with its traceback.
    When what reads standard output is gone, as in ``... | head -1``, it ends silently: with 128 + SIGPIPE where
    that stopped ``main``.
    """
    try:
        return _reported(main, error_code)
    except Exception:
        if _is_alone():
            raise
        traceback.print_exc()
        return ERROR
    finally:
        _end_workers()


def _reported(main: Callable[[], int], error_code: int) -> int:
    try:
        code = main()
        _flush()
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        _flush()
        return stopped_by(signal.SIGPIPE)
    except DINOv2Error as e:
        print(f"error: {words_of(e)}", file=sys.stderr)
        return error_code if e.exit_code is None else e.exit_code
    except OSError as e:
        if not (trouble := describe_no_room(e)):
            raise
        print(f"error: {trouble}", file=sys.stderr)
        return error_code
    except ModuleNotFoundError as e:
        if not (reason := missing_requirement(e)):
            raise
        print(f"error: {reason}", file=sys.stderr)
        return error_code
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return stopped_by(signal.SIGINT)


def leave(code: int) -> NoReturn:
    """End this process, one of a script, with ``code``.

    Where it is one of several, without taking Python apart. The threads of a process group (gloo's) can outlive
    ``distributed.disable``: torch keeps the group in its caches of sharded tensors. One that lets go of its last tensor
    while Python, before 3.14, goes down ends the process with SIGABRT, after a run that was in order. After an error
    the group is still there (``distributed.enabled``), and taking it apart could wait for the others for ever.
    """
    _end_workers()
    if _is_alone():
        sys.exit(code)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    _flush()
    with suppress(OSError):  # nobody reads it
        sys.stderr.flush()
    os._exit(code)


def _is_alone() -> bool:
    try:
        return world_from_environment(os.environ).size == 1
    except DINOv2Error:  # nothing was started then
        return True


def words_of(error: DINOv2Error) -> str:
    """Return the sentence of ``error`` alone, where a data-loading process of torch's put its traceback before it."""
    text, name = str(error), f"{type(error).__module__}.{type(error).__qualname__}: "
    return text.rpartition(name)[2].rstrip() if text.startswith("Caught ") and name in text else text


def describe_no_room(error: OSError) -> str:
    """Return one sentence for a disk that is full, over quota or read-only, "" for anything else."""
    if error.errno not in NO_ROOM:
        return ""
    place = f" for {error.filename}" if error.filename else ""
    what = remedy(error.strerror)
    return f"expected room to write{place}, got {error.strerror}; {what}, then give the same command again"


def missing_requirement(error: ModuleNotFoundError) -> str:
    """Say that a package everything here needs is not installed; "" for any other module."""
    name = (error.name or "").partition(".")[0]
    if name not in REQUIREMENTS:
        return ""
    return (
        f"expected {name} in the environment of {sys.executable}, found none; activate the environment that has it, or "
        "`pip install -c constraints.txt -e .` in the root of the repository"
    )


def _end_workers() -> None:
    """Kill the data-loading processes that an error has left behind.

    They ignore the SIGTERM that multiprocessing sends them when Python ends, which would then wait for ever.
    """
    if "multiprocessing" not in sys.modules:
        return
    left = [process for process in sys.modules["multiprocessing"].active_children() if process.daemon]
    if left and hasattr(signal, "SIGCHLD"):
        with suppress(ValueError):  # not the main thread; torch's handler would raise an error for each
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in left:
        process.kill()
        process.join()


def _nobody_reads() -> bool:
    """Return whether standard output is a pipe whose other end is closed; any other broken pipe is an error."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no such thing as poll, or no file behind sys.stdout
        return False


def _flush() -> None:
    """Write out what standard output holds; drop it if nobody reads, or Python complains at its end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def import_quietly(module: str) -> ModuleType:
    """Import ``module``; a Ctrl-C then ends the process at once, as libraries print or swallow the exception."""
    is_pythons = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_pythons or threading.current_thread() is not threading.main_thread():
        return importlib.import_module(module)
    signal.signal(signal.SIGINT, _leave)
    try:
        return importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(signum: int, frame) -> None:
    os.write(2, b"stopped by Ctrl-C\n")
    os._exit(stopped_by(signum))
