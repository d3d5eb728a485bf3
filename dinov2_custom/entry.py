"""Run the scripts in ``run/``: return the main function's exit code, or print a one-line error. Torch-free."""

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
    *("torch", "numpy", "PIL", "omegaconf", "yaml", "pydantic", "safetensors", "torchmetrics", "tqdm", "submitit"),
    *("filelock", "iopath"),
)


def run(module: str, args: Any, *, error_code: int = ERROR, quiet_threads: bool = False) -> int:
    """Import ``module``, call its ``main(args)`` and return the exit code; ``error_code`` after a DINOv2Error.

    Ctrl-C ends it without a traceback at any point.

    ``quiet_threads``: compute threads sleep while they wait. Spinning threads slow down a CPU run tenfold if data
    loading shares the cores. Torch reads this setting at import, so it must be set here.
    """
    if quiet_threads:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return reported(lambda: import_quietly(module).main(args), error_code=error_code)


def reported(main: Callable[[], int], *, error_code: int = ERROR) -> int:
    """Call ``main`` and return its exit code; ``error_code``, after a one-line message, if it raises a DINOv2Error.

    A disk that is full, over quota or read-only is handled the same way. Any other error is raised, or, in
    one of several processes, which must skip interpreter shutdown (see :func:`leave`), printed with its traceback.
    When what reads standard output is gone, as in ``... | head -1``, it ends silently: with 128 + SIGPIPE where
    that stopped ``main``.
    """
    _print_any_name()
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
        if not _reader_is_gone():
            raise
        _flush()
        return stopped_by(signal.SIGPIPE)
    except Exception as e:
        if not (sentence := sentence_of(e)):
            raise
        print(f"error: {sentence}", file=sys.stderr)
        code = getattr(e, "exit_code", None)
        return error_code if code is None else code
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return stopped_by(signal.SIGINT)


def leave(code: int) -> NoReturn:
    """End this script process with ``code``.

    One of several processes skips interpreter shutdown. The threads of a process group (gloo's) can outlive
    ``distributed.disable``, as torch caches the group in sharded tensors. If such a thread frees its last tensor during
    the shutdown of Python before 3.14, the process aborts with SIGABRT after a successful run. After an error the group
    still exists (``distributed.enabled``), and destroying it could wait for the other processes forever.
    """
    _end_workers()
    if _is_alone():
        sys.exit(code)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    _flush()
    with suppress(OSError):  # the reader is gone
        sys.stderr.flush()
    os._exit(code)


def _is_alone() -> bool:
    try:
        return world_from_environment(os.environ).size == 1
    except DINOv2Error:  # nothing was started in that case
        return True


def sentence_of(error: Exception) -> str:
    """Return the one-sentence message of a user-fixable error, "" for any other error."""
    if isinstance(error, DINOv2Error):
        return message_of(error)
    if isinstance(error, OSError):
        return describe_full_disk(error)
    return missing_requirement(error) if isinstance(error, ModuleNotFoundError) else ""


def message_of(error: DINOv2Error) -> str:
    """Return the message of ``error`` without the traceback that a torch data-loading process prepends."""
    text, name = str(error), f"{type(error).__module__}.{type(error).__qualname__}: "
    return text.rpartition(name)[2].rstrip() if text.startswith("Caught ") and name in text else text


def describe_full_disk(error: OSError) -> str:
    """Return one sentence if a disk is full, over quota or read-only, "" for any other error."""
    if error.errno not in NO_ROOM:
        return ""
    place = f" for {error.filename}" if error.filename else ""
    what = remedy(error.strerror)
    return f"expected room to write{place}, got {error.strerror}; {what}, then run the same command again"


def missing_requirement(error: ModuleNotFoundError) -> str:
    """Return a message if a required package is not installed, "" for any other module."""
    name = (error.name or "").partition(".")[0]
    if name not in REQUIREMENTS:
        return ""
    return (
        f"expected {name} in the environment of {sys.executable}, found none; activate the environment that has it, or "
        "`pip install -c constraints.txt -e .` in the root of the repository"
    )


def _end_workers() -> None:
    """Kill data-loading processes left behind by an error.

    They ignore the SIGTERM that multiprocessing sends at interpreter exit, which would then wait forever.
    """
    if "multiprocessing" not in sys.modules:
        return
    left = [process for process in sys.modules["multiprocessing"].active_children() if process.daemon]
    if left and hasattr(signal, "SIGCHLD"):
        with suppress(ValueError):  # not in the main thread; torch's handler would raise an error for each
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in left:
        process.kill()
        process.join()


def _reader_is_gone() -> bool:
    """Return whether standard output is a pipe whose reader has closed it; any other broken pipe is an error."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # poll is unavailable, or sys.stdout has no file descriptor
        return False


def _print_any_name() -> None:
    """Print characters that standard output cannot encode as escapes, as Python does on standard error.

    A name of a file may be any bytes, and the terminal's encoding ASCII.
    """
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Flush standard output; discard it if the reader is gone, otherwise Python prints an error at exit."""
    if sys.stdout is None:  # closed before the start
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def import_quietly(module: str) -> ModuleType:
    """Import ``module``; Ctrl-C ends the process at once, as libraries may print or swallow the exception."""
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
