"""Processes that build batches into shared slots, in order, and go on when one of them dies.

Each process has a pipe of its own and there is no lock anywhere, so one that is killed at any moment leaves the others
and the main process unharmed. What a batch is, is the business of the object with ``build`` (``train_batches``). Read
:meth:`Ring.next_batch` first.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter, deque
from multiprocessing import connection, resource_tracker, util
from typing import Any, NamedTuple

import numpy as np

from dinov2_custom.errors import DataError

from .slots import Slots
from .workers import set_up_process, stop_signals_held_back

logger = logging.getLogger("dinov2")
TASKS_A_WORKER = 2
MAX_DEATHS, DEATH_WINDOW = 5, 100
NOTHING = -1
PARENT_CHECK_S = 2.0
LOOK_S = 5.0
SLOW_S = 60.0  # without anything from any process, before one is named


class Built(NamedTuple):
    """A finished batch: its ``arrays`` (of slot ``slot``), what ``build`` returned, and the seconds it took."""

    slot: int
    arrays: dict[str, np.ndarray]
    result: Any
    seconds: float


class Failure(NamedTuple):
    """An exception of ``build``, and where it came from."""

    error: Exception
    text: str


class Worker:
    """One process, its pipe, and the (iteration, slot) that it has been given and has not finished."""

    def __init__(self, process: Any, pipe: connection.Connection, word: int):
        self.process = process
        self.pipe = pipe
        self.word = word
        self.tasks: deque[tuple[int, int]] = deque()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


class Ring:
    """Build the batches of ``first_iteration`` and after with ``num_workers`` processes.

    ``builder``: has ``fields``, ``build(iteration, arrays, note) -> result``, where ``note(i)`` says which image is
    being worked on, ``name(i)`` and ``give_up(i, reason)``; picklable where processes are spawned. ``max_workers``:
    for :meth:`grow`. So many processes are started at once, and those beyond ``num_workers`` wait: a fork after the
    first collective can harm memory that nccl has registered with the network (EFA, InfiniBand on old kernels).
    ``stop``: number of the batch after the last; None: endless. ``hang_s``: seconds without a batch after which that is
    an error; None: only warnings, at growing intervals.
    """

    def __init__(
        self,
        builder: Any,
        num_workers: int,
        first_iteration: int,
        *,
        max_workers: int | None = None,
        stop: int | None = None,
        hang_s: float | None = None,
        start_method: str | None = None,
    ):
        self.builder = builder
        self.context = multiprocessing.get_context(start_method)
        self.max_workers = max(num_workers, max_workers or 0)
        self.slots = Slots(builder.fields, TASKS_A_WORKER * self.max_workers + 1, num_words=self.max_workers)
        self.slots.words[:] = NOTHING
        self.free = deque(range(self.slots.number))
        self.next_to_give = self.next_to_deliver = first_iteration
        self.stop, self.hang_s = stop, hang_s
        self.waited_s = 0.0  # for the next thing to happen
        self.next_warning_s = SLOW_S
        self.done: dict[int, tuple[int, Any, float]] = {}
        self.deaths_at: Counter[int] = Counter()
        self.given_up: dict[int, str] = {}
        self.recent_deaths: list[int] = []
        self.owner = os.getpid()
        self.workers: list[Worker] = []
        self.spares: list[Worker] = []
        self._at_exit = util.Finalize(self, _kill_all, (self.workers, self.spares), exitpriority=100)
        for word in range(self.max_workers):
            (self.workers if word < num_workers else self.spares).append(self._start(word))
        self._give()

    def next_batch(self) -> Built:
        """Return the next batch in order; its slot is not used again before :meth:`release`.

        Raises:
            DataError: the processes die again and again, or one hangs for ``hang_s``.
        """
        while self.next_to_deliver not in self.done:
            self._wait()
        slot, result, seconds = self.done.pop(self.next_to_deliver)
        if isinstance(result, Failure):
            raise result.error from RuntimeError(f"in a data-loading process:\n{result.text}")
        self.next_to_deliver += 1
        return Built(slot, self.slots.arrays(slot), result, seconds)

    def release(self, slot: int) -> None:
        """Let ``slot`` be filled again."""
        self.free.appendleft(slot)  # the last one in use is the next: slots that nobody needs take no memory
        self._give()

    def grow(self, num_workers: int) -> None:
        """Use more of the processes, up to ``num_workers`` (at most ``max_workers``)."""
        while len(self.workers) < num_workers and self.spares:
            self.workers.append(self.spares.pop(0))
        self._give()

    def close(self) -> None:
        """End all processes at once, whatever they are doing; without effect in a forked child."""
        if os.getpid() == self.owner and self._at_exit.still_active():
            self._at_exit()
            self.slots.close()

    def _start(self, word: int) -> Worker:
        ours, theirs = self.context.Pipe()
        forked = self.context.get_start_method() == "fork"  # with copies of `ours`: the pipe would stay open
        args = (theirs, self.slots, word, self.builder, dict(self.given_up), os.getpid() if forked else None)
        process = self.context.Process(target=work, args=args, name=f"data-{word}", daemon=True)
        if not forked:
            resource_tracker.ensure_running()  # which would let the signals through again
        with stop_signals_held_back():  # else one that comes before the child ignores it would kill it
            process.start()
        theirs.close()
        return Worker(process, ours, word)

    def _give(self) -> None:
        """Give tasks, in order, to the processes that have the fewest."""
        while self.free and self.next_to_give != self.stop:
            worker = min(self.workers, key=lambda one: len(one.tasks))
            if len(worker.tasks) >= TASKS_A_WORKER:
                return
            task = (self.next_to_give, self.free.popleft())
            self.next_to_give += 1
            worker.tasks.append(task)
            self._send(worker, ("build", *task))

    def _send(self, worker: Worker, message: tuple) -> None:
        try:
            worker.pipe.send(message)
        except OSError:
            pass  # it is dead, which _wait will see

    def _wait(self) -> None:
        """Wait for a finished batch or the death of a process, and deal with it."""
        things = [one.pipe for one in self.workers] + [one.process.sentinel for one in self.workers]
        start = time.monotonic()
        ready = connection.wait(things, timeout=LOOK_S)
        if not ready:
            # time in which all processes were stopped does not count
            self.waited_s += min(time.monotonic() - start, 2 * LOOK_S)
            self._look_for_hanging()
            return
        self.waited_s, self.next_warning_s = 0.0, SLOW_S
        for worker in list(self.workers):
            if worker.pipe in ready and self._receive(worker):
                continue
            if worker.process.sentinel in ready:
                while self._receive(worker):
                    pass
                self._replace(worker)

    def _look_for_hanging(self) -> None:
        """Warn of the processes that have had work for long, at growing intervals.

        Raises:
            DataError: nothing came for ``hang_s``.
        """
        gives_up = self.hang_s is not None and self.waited_s >= self.hang_s
        if not gives_up and self.waited_s < self.next_warning_s:
            return
        self.next_warning_s *= 2
        places = [f"process {one.process.pid} {self._place(one)}" for one in self.workers if one.tasks]
        story = f"no batch for {self.waited_s:.0f} s: data-loading {', '.join(places)}"
        if gives_up:
            raise DataError(f"{story}; look whether its file system answers, or leave the image out")
        logger.warning(story)

    def _place(self, worker: Worker) -> str:
        index = int(self.slots.words[worker.word])
        return "is between two images" if index == NOTHING else f"reads {self.builder.name(index)}"

    def _receive(self, worker: Worker) -> bool:
        """Take one message of ``worker``; return whether there was one."""
        try:
            if not worker.pipe.poll():
                return False
            iteration, result, seconds = worker.pipe.recv()
        except (EOFError, OSError):
            return False
        _, slot = worker.tasks.popleft()
        self.done[iteration] = (slot, result, seconds)
        return True

    def _replace(self, dead: Worker) -> None:
        """Put a spare process, or else a new one, in the place of ``dead``, with its tasks.

        The image that it died at is tried once more; when that kills a second process, it counts as unreadable.
        """
        dead.process.join()
        how = describe_exit(dead.process.exitcode)
        index = int(self.slots.words[dead.word])
        self.slots.words[dead.word] = NOTHING
        place = "between two images" if index == NOTHING else f"while it read {self.builder.name(index)}"
        story = f"data-loading process {dead.process.pid} {how} {place}"
        self.recent_deaths = [n for n in self.recent_deaths if n > self.next_to_deliver - DEATH_WINDOW]
        self.recent_deaths.append(self.next_to_deliver)
        if index != NOTHING:
            self.deaths_at[index] += 1
            if self.deaths_at[index] == 2:
                self._give_up(index, f"two data-loading processes died of it, the last one {how}")
        if len(self.recent_deaths) > MAX_DEATHS:
            raise DataError(
                f"expected living data-loading processes, got {len(self.recent_deaths)} dead ones within "
                f"{DEATH_WINDOW} iterations; the last: {story}; if memory ran out, lower train.num_workers or "
                "train.batch_size_per_gpu"
            )
        logger.warning(f"{story}; another one goes on in its place")
        tasks = dead.tasks
        dead.kill()
        fresh = self.spares.pop() if self.spares else self._start(dead.word)
        fresh.tasks.extend(tasks)
        self.workers[self.workers.index(dead)] = fresh
        for task in tasks:
            self._send(fresh, ("build", *task))

    def _give_up(self, index: int, reason: str) -> None:
        self.given_up[index] = reason
        del self.recent_deaths[-2:]
        for worker in (*self.workers, *self.spares):
            self._send(worker, ("give_up", index, reason))


def work(
    pipe: connection.Connection, slots: Slots, word: int, builder: Any, given_up: dict[int, str], parent: int | None
) -> None:
    """Build what is asked for, until the pipe closes or process ``parent`` is gone: the life of one process."""
    set_up_process()
    words = slots.words

    def note(index: int) -> None:
        words[word] = index

    for index, reason in given_up.items():
        builder.give_up(index, reason)
    try:
        while True:
            while not pipe.poll(PARENT_CHECK_S):
                if parent not in (None, os.getppid()):
                    return
            kind, *message = pipe.recv()
            if kind == "give_up":
                builder.give_up(*message)
                continue
            iteration, slot = message
            start = time.perf_counter()
            result = _build(builder, iteration, slots.arrays(slot), note)
            note(NOTHING)
            pipe.send((iteration, result, time.perf_counter() - start))
    except (EOFError, OSError):  # the main process has closed the pipe, or is gone
        return


def _build(builder: Any, iteration: int, arrays: dict[str, np.ndarray], note: Any) -> Any:
    try:
        return builder.build(iteration, arrays, note)
    except Exception as e:
        text = traceback.format_exc()
        try:
            reduced = multiprocessing.reduction.ForkingPickler.dumps(e)
            multiprocessing.reduction.ForkingPickler.loads(reduced)
        except Exception:
            e = RuntimeError(f"{type(e).__name__}: {e}")
        return Failure(e, text)


def describe_exit(exitcode: int | None) -> str:
    """Say how a process ended."""
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name if -exitcode in set(signal.Signals) else f"signal {-exitcode}"
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _kill_all(*groups: list[Worker]) -> None:
    for worker in itertools.chain(*groups):
        worker.process.kill()
    for worker in itertools.chain(*groups):
        worker.kill()
    for group in groups:
        group.clear()
