"""Start a function of this project in a process of its own and kill it (signal 9) once enough is done."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.processes import Job, running, wait_until


def kill_when(code: str, enough: Callable[[], bool]) -> None:
    """Run ``code`` with the repository on its path; kill it without warning once ``enough()``."""
    process = Job("-c", code)
    try:
        wait_until(enough, "the moment to kill it", [process])
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def wait_for_end_of(processes: set[int]) -> None:
    """Wait until none of the processes runs, which the death of their parent has to bring about."""
    wait_until(lambda: not running(processes), "the end of the decoder processes")
