"""Report what ends a process of a run in the main log: an error, a lost process, a step that never finishes.

An error that the user can fix is one line in the main log, any other is logged with its traceback.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from dinov2_custom import distributed
from dinov2_custom.errors import LOST_PROCESS, DINOv2Error, LostProcessError, ResourceError, reason_of
from dinov2_custom.logging.setup import log_path

logger = logging.getLogger("dinov2")
LOOK_S = 2.0  # between checks of the other processes on this machine
GRACE_S = 10.0  # for the main thread to raise a more specific error, and for all processes to write their stacks
LEAVE_S = 2.0  # for the last lines to be written
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
_NO_MEMORY += ("CUBLAS_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED")  # of libraries, for workspaces: cuBLAS, cuDNN
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket Timeout")
_LOST += ("ncclRemoteError",)


class Watchdog:
    """Context manager that ends this process with ``LOST_PROCESS`` when the run cannot continue.

    This happens when the main thread completes no step for too long, or when another process of the run on this machine
    ends. The stacks of all threads are written to the process's log first. If the step finishes within ``GRACE_S``
    after that, it was only slow and the run continues. The check runs in a thread that needs no collective, no GPU and
    not the main thread. Time during which the system suspends the process does not count, so a job may be suspended and
    resumed.

    All processes must create it and, unless they end with an error, exit it.

    Args:
        run: the run directory.
        hang_s: seconds without a step after which the process counts as hung, three times as long for the first step
            and for saves; 0 disables the check.
    """

    def __init__(self, run: Path, hang_s: float) -> None:
        self.run, self.hang_s = Path(run), hang_s
        self.iteration: int | None = None
        self._allowed_s, self._marks = 3 * hang_s, 0
        self._peers = _local_peers()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            distributed.barrier()  # a process that finishes early is not lost
        self._ended.set()
        self._thread.join()
        for _, handle in self._peers.values():
            os.close(handle)

    def mark(self, iteration: int, patience: int = 1) -> None:
        """Record that the main thread works on ``iteration``, which may take ``patience`` times the usual seconds."""
        if self.iteration is not None:
            self._allowed_s = patience * self.hang_s
        self.iteration = iteration
        self._marks += 1

    def _watch(self) -> None:
        tick_s = min(LOOK_S, self.hang_s / 16) if self.hang_s else LOOK_S
        marks, still_s, lost_s, reported, last = self._marks, 0.0, 0.0, False, time.monotonic()
        while not self._ended.wait(tick_s):
            now = time.monotonic()
            passed_s, last = min(now - last, 4 * tick_s), now  # larger gaps occur only while the process is suspended
            lost = [f"rank {rank} (pid {pid})" for rank, (pid, handle) in self._peers.items() if _has_ended(handle)]
            lost_s = lost_s + passed_s if lost else 0.0
            still_s += passed_s
            if self._marks != marks:
                marks, still_s, reported = self._marks, 0.0, False
            if lost_s > GRACE_S:
                what = f"{', '.join(lost)} has ended, possibly killed because memory ran out (see dmesg)"
                is_over = lost_s > GRACE_S + LEAVE_S
            elif self.hang_s and still_s > self._allowed_s:
                what = f"no step for {self._allowed_s:g} s (train.hang_timeout)"
                is_over = still_s > self._allowed_s + GRACE_S
            else:
                continue
            if is_over:
                self._leave()
            elif not reported:
                reported = True
                # in a thread of its own: another thread may hold the terminal's lock, the file system may hang
                threading.Thread(target=self._report, args=(what,), daemon=True).start()

    def _report(self, what: str) -> None:
        """Write the stacks of all threads to this process's log, and a line to the terminal and the main log."""
        log = log_path(self.run)
        text = f"{what} at iteration={self.iteration}; the stacks of all threads are in {log}"
        text += "; the same command resumes from the newest checkpoint"
        print(f"error: rank {distributed.get_global_rank()}: {text}", file=sys.stderr, flush=True)
        with suppress(OSError):  # for example a full disk
            append_to_main_log(self.run, text)
            with open(log, "ab", buffering=0) as file:
                faulthandler.dump_traceback(file)

    def _leave(self) -> None:
        for pid, handle in self._peers.values():
            with suppress(OSError):
                # no launcher's SIGTERM would end a process that is stopped (SIGSTOP, a debugger)
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt":
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        os._exit(LOST_PROCESS)


def _local_peers() -> dict[int, tuple[int, int]]:
    """Return {rank: (process number, handle)} of the other processes on this machine. All processes must call it."""
    place = None
    with suppress(OSError):  # process numbers are unique within a host's boot and a container's namespace
        place = (Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid"))
    peers = {}
    for rank, (where, pid) in enumerate(distributed.gather_objects((place, os.getpid()))):
        if place and where == place and pid != os.getpid() and hasattr(os, "pidfd_open"):
            with suppress(OSError):  # it has ended, so the first collective fails; or the kernel is too old
                peers[rank] = (pid, os.pidfd_open(pid))
    return peers


def _has_ended(handle: int) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))


def append_to_main_log(run: Path, text: str) -> None:
    """Append a line to the run's log from any process with a single write; it is on disk when this returns."""
    line = f"E{time.strftime('%Y%m%d %H:%M:%S')} {os.getpid()} dinov2 rank {distributed.get_global_rank()}] {text}\n"
    path = Path(run) / "logs" / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode(errors="backslashreplace"))
        with suppress(OSError):  # a file system without fsync
            os.fsync(file)


@contextmanager
def reported(cfg, run: Path) -> Iterator[None]:
    """Log the error that ends the body, once even if nested, and raise what :func:`translate` returns."""
    try:
        yield
    except Exception as e:
        if getattr(e, "is_reported", False):
            raise
        translated = translate(e, cfg, run)
        translated.is_reported = True
        if translated is e:
            raise
        raise translated from e


def translate(error: Exception, cfg, run: Path) -> Exception:
    """Log ``error`` and return the exception to raise in its place, which may be ``error`` itself.

    Out of memory becomes a ResourceError, a broken connection to another process a LostProcessError. Tracebacks are
    written to this process's log and to the main log.
    """
    refused = isinstance(error, DINOv2Error)  # before the run began, nothing of it is kept: see run_directory
    if is_out_of_memory(error):
        error = ResourceError(describe_memory(cfg, error))
    if distributed.is_enabled() and not isinstance(error, DINOv2Error) and any(text in str(error) for text in _LOST):
        error = LostProcessError(
            f"expected all {distributed.get_global_size()} processes, got a broken connection to one that has ended "
            f"({reason_of(error)}); see its log in {Path(run) / 'logs'} or the launcher's; the same command "
            "resumes from the newest checkpoint"
        )
    if isinstance(error, DINOv2Error):
        logger.error(str(error), extra={"file_only": True})  # the caller prints it
        text = str(error)
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows this file when it ends
            ErrorHandler().record_exception(error)
        logger.error(text, extra={"file_only": True})
    if not distributed.is_main_process() and not (refused and not (Path(run) / "logs").exists()):
        append_to_main_log(run, text)
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` means that a device or the machine is out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def describe_memory(cfg, error: BaseException) -> str:
    """Return one sentence on how much memory was requested and which setting to change."""
    batch, crops, locals_ = cfg.train.batch_size_per_gpu, cfg.crops, cfg.crops.local_crops_number
    images = batch * (2 + locals_)
    sentences = str(error).partition("\n")[0].split(". ")
    known = [one for one in sentences if "allocate" in one or "capacity" in one]  # the sentences that give the amounts
    known = known or [one for one in sentences if "memory" in one] or sentences[:1]
    reason = (". ".join(known) or type(error).__name__)[:200]
    sizes = f"2 of {crops.global_crops_size} px and {locals_} of {crops.local_crops_size} px each"
    return (
        f"memory: expected room for a batch of {batch} images per process = {images} crops ({sizes}) through "
        f"{cfg.student.arch}, got none ({reason}); lower train.batch_size_per_gpu to {max(1, batch // 2)} with "
        f"optim.accumulation_steps={2 * cfg.optim.accumulation_steps} for the same step, raise train.view_groups, or "
        "take smaller crops"
    )
