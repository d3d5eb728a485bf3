"""Start a function of this project in a process of its own and kill it (signal 9) once enough is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.processes import ENVIRONMENT, REPOSITORY


def kill_when(code: str, enough: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Run ``code`` with the repository on its path; kill it without warning once ``enough()``."""
    environment = os.environ | ENVIRONMENT
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + timeout_s
        while not enough():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for_end_of(processes: set[int], timeout_s: float = 10.0) -> None:
    """Wait until none of the processes runs, which the death of their parent has to bring about."""
    deadline = time.monotonic() + timeout_s
    while any(map(is_running, processes)):
        assert time.monotonic() < deadline, "decoder processes outlive the one that was killed"
        time.sleep(0.02)
