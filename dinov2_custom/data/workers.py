"""What every data-loading process needs: one thread, deaf to the signals that ask the run to save and stop.

A signal to the whole process group (Ctrl-C, a scheduler's SIGTERM) would end the workers first, and their death the run
before it has saved. They end with the loader, or when the main process is gone. Read :func:`set_up_process` first.
"""

from __future__ import annotations

import ctypes
import logging
import math
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dinov2_custom.world import num_cores

logger = logging.getLogger("dinov2")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def set_up_process() -> None:
    """Keep this process to one thread and ignore the stop signals, held-back ones included.

    On Linux the process ends with its parent, however that ends, also while it is stopped or waits for a disk: it would
    keep its memory, and a GPU's pinned pages, for good.
    """
    torch.set_num_threads(1)
    if "cv2" in sys.modules:  # imported before the fork
        sys.modules["cv2"].setNumThreads(0)
    end_with_parent()
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_with_parent() -> None:
    """Have the system kill this process when the thread that started it ends (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def set_up_worker(worker_id: int) -> None:
    """Set up a worker of a torch DataLoader; in the main process (no workers) only the threads."""
    if torch.utils.data.get_worker_info() is None:
        torch.set_num_threads(1)
    else:
        set_up_process()


@contextmanager
def stop_signals_held_back() -> Iterator[None]:
    """Hold the stop signals back while a process is started, and in it until :func:`set_up_process`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def at_most_cores(num_workers: int) -> int:
    """Return ``num_workers``, lowered to the number of cores this process may use (more only cost memory)."""
    cores = num_cores()
    if num_workers > cores:
        logger.info(f"data-loading processes: {cores}, not {num_workers}: there are {cores} cores")
    return min(num_workers, cores)


def workers_of_choice(num_workers: int | str, cores: int) -> int:
    """Return ``num_workers``, for "auto" one a core of the ``cores`` of this process, at most ``AutoWorkers.LIMIT``."""
    return min(cores, AutoWorkers.LIMIT) if num_workers == "auto" else num_workers


class AutoWorkers:
    """Choose the number of processes from what a batch and a step take: enough to keep up, and one more.

    Begins with ``first``, decides after ``STEPS`` steps (the first ``WARM_UP`` of them do not count), never above
    ``most``: ``cores``, this rank's share of the machine's, at most ``LIMIT`` (a process has two batches of memory).
    """

    WARM_UP, STEPS, LIMIT = 3, 10, 16

    def __init__(self, batch_size: int, cores: int | None = None):
        self.batch_size = batch_size
        self.most = min(self.LIMIT, cores or num_cores())
        self.chosen = self.first = min(2, self.most)
        self._seen: list[tuple[float, float]] = []

    def observe(self, build_s: float, step_s: float) -> bool:
        """Note what one batch took to build and its step to run; return whether ``chosen`` has just been decided."""
        if len(self._seen) >= self.STEPS:
            return False
        self._seen.append((build_s, step_s))
        if len(self._seen) < self.STEPS:
            return False
        build_s, step_s = (statistics.median(times) for times in zip(*self._seen[self.WARM_UP :], strict=True))
        self.chosen = min(self.most, math.ceil(build_s / max(step_s, 1e-6)) + 1)
        logger.info(
            f"data-loading processes: {max(self.chosen, self.first)} (train.num_workers=auto): one makes "
            f"{self.batch_size / build_s:,.0f} images/s, a step uses {self.batch_size / max(step_s, 1e-6):,.0f} "
            f"images/s, {self.most} cores for this rank"
        )
        return True
