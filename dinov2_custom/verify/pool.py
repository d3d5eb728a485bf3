"""Apply a function to numbers in several processes, tolerating the death of any of them.

Decoders are C code applied to corrupt input. A process that dies (segmentation fault, out of memory) or hangs is
replaced, its other work is repeated, and the number on which it died gets a :class:`Death` as its result. Results are
sent through pipes, so this is unsuitable for torch tensors and for very small tasks.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from dinov2_custom.data.pool import describe_exit, end_with_parent
from dinov2_custom.errors import DataError, DINOv2Error

IDLE = -1
ATTEMPTS = 2  # number of dead processes after which an image is considered the cause
CHUNKS_AHEAD = 2


class Death(NamedTuple):
    """Replaces the result of a number on which the process died; ``reason`` describes how."""

    reason: str


def run_pool(
    work: Callable[[int], Any],
    items: Iterable[int],
    *,
    workers: int,
    chunk: int = 16,
    ordered: bool = False,
    window: int = 1 << 30,
    time_limit_s: float = 600.0,
) -> Iterator[tuple[int, Any]]:
    """Yield (item, ``work(item)``) for each distinct item, computed by ``workers`` processes.

    Args:
        work: called in the processes; an exception ends the run. It must be picklable if processes are not forked.
        chunk: number of items sent to a process at a time; their results are returned together.
        ordered: yield in the order of ``items`` instead of the order of completion.
        window: maximum number of items in progress or waiting to be yielded (bounds memory if ``ordered``).
        time_limit_s: a process that takes longer for one item is killed.

    Raises:
        DataError: if processes keep dying before they do any work.
        DINOv2Error: if ``work`` raised it.
        RuntimeError: if ``work`` raised another exception; the message is its traceback.
    """
    pool = _Pool(work, iter(items), workers, chunk, window, time_limit_s)
    early: dict[int, Any] = {}
    try:
        for item, result in pool.results():
            if not ordered:
                pool.waiting.pop(item)
                yield item, result
                continue
            early[item] = result
            while pool.waiting and (first := next(iter(pool.waiting))) in early:
                pool.waiting.pop(first)
                yield first, early.pop(first)
    finally:
        pool.close()


class _Worker:
    """A process, the pipe to it, and the items sent to it whose results have not arrived."""

    def __init__(self, context: Any, work: Callable[[int], Any], foreign: list[Connection]):
        self.current = context.RawValue("q", IDLE)
        self.pipe, theirs = context.Pipe()
        inherited = [*foreign, self.pipe] if context.get_start_method() == "fork" else []
        self.process = context.Process(target=_serve, args=(work, theirs, self.current, inherited), daemon=True)
        with warnings.catch_warnings():
            # Python warns about forks in threaded processes; these children only read, decode and write to their pipe
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        theirs.close()
        self.todo: deque[int] = deque()
        self.seen, self.spent_s, self.looked = IDLE, 0.0, time.monotonic()

    def overdue(self, limit_s: float) -> bool:
        """Return whether one item has taken ``limit_s`` seconds; long gaps between calls are mostly not counted."""
        item, now = self.current.value, time.monotonic()
        self.spent_s = self.spent_s + min(now - self.looked, 2.0) if item == self.seen != IDLE else 0.0
        self.seen, self.looked = item, now
        return self.spent_s > limit_s

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


class _Pool:
    def __init__(self, work: Any, items: Iterator[int], workers: int, chunk: int, window: int, time_limit_s: float):
        self.context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.work, self.items, self.chunk, self.window, self.time_limit_s = work, items, chunk, window, time_limit_s
        self.waiting: dict[int, None] = {}  # sent but not yet yielded, in order
        self.again: deque[list[int]] = deque()  # work to repeat, of processes that died
        self.deaths: dict[int, int] = {}
        self.deaths_without_work = 0
        self.finished: deque[tuple[int, Any]] = deque()
        self.workers: list[_Worker] = []
        for _ in range(workers):
            self._start()

    def _start(self) -> None:
        self.workers.append(_Worker(self.context, self.work, [worker.pipe for worker in self.workers]))

    def results(self) -> Iterator[tuple[int, Any]]:
        while True:
            while self.finished:  # yield before feeding, which makes room in the window
                yield self.finished.popleft()
            for worker in list(self.workers):
                self._feed(worker)
            busy = {worker.pipe: worker for worker in self.workers if worker.todo}
            if not busy and not self.again and not self.finished:
                return
            for pipe in wait(list(busy), timeout=1.0):
                self._receive(busy[pipe])
            for worker in list(self.workers):
                if worker.overdue(self.time_limit_s):
                    self._replace(worker, f"took longer than {self.time_limit_s:g} s")

    def _feed(self, worker: _Worker) -> None:
        while len(worker.todo) <= (CHUNKS_AHEAD - 1) * self.chunk:
            items = self._next_chunk()
            if not items:
                return
            worker.todo += items
            try:
                worker.pipe.send(items)
            except OSError:  # it died; _receive detects that at the other end of the pipe
                return

    def _next_chunk(self) -> list[int]:
        if self.again:
            return self.again.popleft()
        items: list[int] = []
        while len(items) < self.chunk and len(self.waiting) < self.window:
            item = next(self.items, None)
            if item is None:
                break
            self.waiting[item] = None
            items.append(item)
        return items

    def _receive(self, worker: _Worker) -> None:
        try:
            results, failure = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker, "")
            return
        self.finished += results
        for _ in results:
            worker.todo.popleft()
        if isinstance(failure, DINOv2Error):
            raise failure
        if failure:
            raise RuntimeError(f"a decoder process failed:\n{failure}")

    def _replace(self, worker: _Worker, reason: str) -> None:
        """Replace a dead or hanging process, record a failed attempt for its current item, and requeue the rest."""
        item = worker.current.value
        if not reason:
            worker.process.join(10.0)
        code = worker.process.exitcode
        worker.end()
        lost = list(worker.todo)
        self.workers.remove(worker)
        if item in lost:
            lost.remove(item)
            self.deaths[item] = self.deaths.get(item, 0) + 1
            if reason or self.deaths[item] >= ATTEMPTS:
                self.finished.append((item, Death(reason or f"the process {describe_exit(code)} while decoding it")))
            else:
                self.again.append([item])
        else:
            self.deaths_without_work += 1
            if self.deaths_without_work > 10 + 2 * len(self.workers):
                raise DataError(
                    f"expected decoder processes to run, got {self.deaths_without_work} that died at once "
                    f"(the last {describe_exit(code)}); use fewer --workers, or more memory"
                )
        self.again.extend(lost[i : i + self.chunk] for i in range(0, len(lost), self.chunk))
        self._start()

    def close(self) -> None:
        for worker in self.workers:
            worker.end()


def _serve(work: Callable[[int], Any], pipe: Connection, current: Any, inherited: list[Connection]) -> None:
    """Process chunks until the other end of the pipe is closed, which also happens if that process is killed."""
    end_with_parent()
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)  # the results contain everything to report
    warnings.simplefilter("ignore")
    try:
        while True:
            items, results, failure = pipe.recv(), [], ""
            try:
                for item in items:
                    current.value = item
                    results.append((item, work(item)))
            except DINOv2Error as e:
                failure = e
            except Exception:
                failure = traceback.format_exc()
            current.value = IDLE
            pipe.send((results, failure))
    except (EOFError, OSError):
        pass
