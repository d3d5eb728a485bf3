"""Run a function in a separate process and kill it (signal 9) after some progress."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.processes import Job, running, wait_until


def kill_when(code: str, enough: Callable[[], bool]) -> None:
    """Run ``code`` with the repository on its path; kill it once ``enough()`` returns true."""
    process = Job("-c", code)
    try:
        wait_until(enough, "the moment to kill it", [process])
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def wait_for_end_of(processes: set[int]) -> None:
    """Wait until all of the processes have ended, which must follow from the death of their parent."""
    wait_until(lambda: not running(processes), "the end of the decoder processes")
