"""Worker processes that build batches in shared memory, in order, and are replaced if they die.

:class:`Slots` is the memory: numbered slots, each with the same named arrays, and one word per process. It is anonymous
(memfd) on Linux, so that the size of /dev/shm is no limit and a killed process leaves nothing behind; elsewhere it is a
file in the temporary folder that is unlinked as soon as it is open.

:class:`Ring` assigns batches to processes and returns them in order. Each process has its own pipe and there are no
locks, so a process that is killed at any moment does not affect the others or the main process. The object with
``build`` (in ``samples`` and ``image_batches``) defines the contents of a batch.

Data-loading processes use one thread and ignore the signals that request a save and stop. Otherwise a signal to the
whole process group (Ctrl-C, a scheduler's SIGTERM) would end them, and thereby the run, before it has saved. They end
with the loader, or when the main process has ended.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import mmap
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import connection, reduction, resource_tracker, util
from typing import Any, NamedTuple

import numpy as np
import torch

from dinov2_custom.errors import DataError
from dinov2_custom.world import num_cores

logger = logging.getLogger("dinov2")
TASKS_A_WORKER = 2
MAX_DEATHS, DEATH_WINDOW = 5, 100
NOTHING = -1
PARENT_CHECK_S = 2.0
LOOK_S = 5.0
SLOW_S = 60.0  # time without a message from any process before a warning
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PAGE = mmap.ALLOCATIONGRANULARITY
ALIGNMENT = 64


class Field(NamedTuple):
    """One array of a slot."""

    shape: tuple[int, ...]
    dtype: Any = np.uint8


def allocate(fields: Mapping[str, Field]) -> dict[str, np.ndarray]:
    """Return one slot in this process's own memory."""
    return {name: np.zeros(field.shape, field.dtype) for name, field in fields.items()}


class Slots:
    """``number`` slots of ``fields`` and ``num_words`` int64 words, in memory shared with child processes.

    Pass it to a child as an argument of its process, with any start method.

    Raises:
        DataError: if there is not enough memory.
    """

    def __init__(self, fields: Mapping[str, Field], number: int, num_words: int = 0):
        self.fields = dict(fields)
        self.number = number
        self.num_words = num_words
        self.slot_size = _round_up(sum(_size(field) for field in self.fields.values()), PAGE)
        self.start = _round_up(8 * num_words, PAGE)
        self._fd = _open(self.start + number * self.slot_size)
        self._map()

    def _map(self) -> None:
        self._memory = mmap.mmap(self._fd, max(PAGE, self.start + self.number * self.slot_size))
        self._bytes = np.frombuffer(self._memory, np.uint8)

    @property
    def words(self) -> np.ndarray:
        """The int64 words, initially zero."""
        return self._bytes[: 8 * self.num_words].view(np.int64)

    def bytes_of(self, i: int) -> np.ndarray:
        """Return all bytes of slot ``i``, a whole number of pages."""
        return self._bytes[self.start + i * self.slot_size :][: self.slot_size]

    def arrays(self, i: int) -> dict[str, np.ndarray]:
        """Return the arrays of slot ``i``, views of the shared memory."""
        place, arrays = self.start + i * self.slot_size, {}
        for name, field in self.fields.items():
            count = math.prod(field.shape) * np.dtype(field.dtype).itemsize
            arrays[name] = self._bytes[place : place + count].view(field.dtype).reshape(field.shape)
            place += _size(field)
        return arrays

    def close(self) -> None:
        """Release the memory; it is freed when no process has an array that refers to it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self._bytes, self._memory = -1, None, None

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_memory", "_bytes")}
        state["_fd"] = reduction.DupFd(self._fd)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fd = state["_fd"].detach()
        self._map()


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _size(field: Field) -> int:
    return _round_up(math.prod(field.shape) * np.dtype(field.dtype).itemsize, ALIGNMENT)


def _open(size: int) -> int:
    """Return the descriptor of an unnamed file of ``size`` zero bytes."""
    size = max(size, PAGE)
    if hasattr(os, "memfd_create"):
        try:
            fd = os.memfd_create("dinov2_batches")
        except OSError:
            pass
        else:
            os.ftruncate(fd, size)
            return fd
    return _open_file(size)


def _open_file(size: int) -> int:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size > 0.95 * free:
        raise DataError(
            f"expected {size / 2**20:,.0f} MiB for batches in {folder}, got {free / 2**20:,.0f} MiB free; set TMPDIR "
            "to a folder with room, or lower train.num_workers or train.batch_size_per_gpu"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # raises here if the disk is full, instead of SIGBUS later
        else:
            os.truncate(file.fileno(), size)
        fd = os.dup(file.fileno())
    logger.info(
        f"batches are passed through a file in {folder} ({size / 2**20:,.0f} MiB), because this system has no "
        "anonymous shared memory"
    )
    return fd


class Built(NamedTuple):
    """A finished batch: its ``arrays`` (of slot ``slot``), the return value of ``build``, and its duration in s."""

    slot: int
    arrays: dict[str, np.ndarray]
    result: Any
    seconds: float


class Failure(NamedTuple):
    """An exception raised by ``build``, and its traceback."""

    error: Exception
    text: str


class Worker:
    """One process, its pipe, and the (iteration, slot) pairs assigned to it and not yet finished."""

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
    """Build the batches from ``first_iteration`` on with ``num_workers`` processes.

    ``builder``: has ``fields``, ``build(iteration, arrays, note) -> result``, where ``note(i)`` records the image being
    read, ``name(i)`` and ``give_up(i, reason)``; it must be picklable if processes are spawned. ``max_workers``: limit
    for :meth:`grow`. This many processes are started in the beginning, and those beyond ``num_workers`` stay idle,
    because a fork after the first collective can corrupt memory that NCCL has registered with the network (EFA,
    InfiniBand on old kernels).
    ``stop``: number of the batch after the last; None for an endless sequence. ``hang_s``: seconds without a batch
    after which an error is raised; None only warns, at growing intervals.
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
        self.waited_s = 0.0  # since the last message
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
        """Return the next batch in order; its slot is not reused before :meth:`release`.

        Raises:
            DataError: if processes die repeatedly, or one hangs for ``hang_s``.
        """
        while self.next_to_deliver not in self.done:
            self._wait()
        slot, result, seconds = self.done.pop(self.next_to_deliver)
        if isinstance(result, Failure):
            raise result.error from RuntimeError(f"in a data-loading process:\n{result.text}")
        self.next_to_deliver += 1
        return Built(slot, self.slots.arrays(slot), result, seconds)

    def release(self, slot: int) -> None:
        """Allow ``slot`` to be reused."""
        self.free.appendleft(slot)  # reuse the most recent slot first, so that unneeded slots take no memory
        self._give()

    def grow(self, num_workers: int) -> None:
        """Use up to ``num_workers`` of the processes (at most ``max_workers``)."""
        while len(self.workers) < num_workers and self.spares:
            self.workers.append(self.spares.pop(0))
        self._give()

    def close(self) -> None:
        """Kill all processes immediately; no effect in a forked child."""
        if os.getpid() == self.owner and self._at_exit.still_active():
            self._at_exit()
            self.slots.close()

    def _start(self, word: int) -> Worker:
        ours, theirs = self.context.Pipe()
        forked = self.context.get_start_method() == "fork"  # the child inherits `ours`, which keeps the pipe open
        args = (theirs, self.slots, word, self.builder, dict(self.given_up), os.getpid() if forked else None)
        process = self.context.Process(target=work, args=args, name=f"data-{word}", daemon=True)
        if not forked:
            resource_tracker.ensure_running()  # starting it later would unblock the signals
        with stop_signals_held_back():  # otherwise a signal could kill the child before it ignores signals
            process.start()
        theirs.close()
        return Worker(process, ours, word)

    def _give(self) -> None:
        """Assign tasks, in order, to the processes with the fewest."""
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
            pass  # it is dead; _wait handles that

    def _wait(self) -> None:
        """Wait for a finished batch or the death of a process, and handle it."""
        things = [one.pipe for one in self.workers] + [one.process.sentinel for one in self.workers]
        start = time.monotonic()
        ready = connection.wait(things, timeout=LOOK_S)
        if not ready:
            # do not count time during which all processes were stopped
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
        """Warn of processes that have been busy for a long time, at growing intervals.

        Raises:
            DataError: if there was no message for ``hang_s``.
        """
        gives_up = self.hang_s is not None and self.waited_s >= self.hang_s
        if not gives_up and self.waited_s < self.next_warning_s:
            return
        self.next_warning_s *= 2
        places = [f"process {one.process.pid} {self._place(one)}" for one in self.workers if one.tasks]
        story = f"no batch for {self.waited_s:.0f} s: data-loading {', '.join(places)}"
        if gives_up:
            raise DataError(f"{story}; check that its file system responds, or remove the image")
        logger.warning(story)

    def _place(self, worker: Worker) -> str:
        index = int(self.slots.words[worker.word])
        return "is between two images" if index == NOTHING else f"reads {self.builder.name(index)}"

    def _receive(self, worker: Worker) -> bool:
        """Receive one message of ``worker``; return whether there was one."""
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
        """Replace ``dead`` by a spare process, or else a new one, and reassign its tasks.

        The image during which it died is tried once more; if a second process dies of it, it is marked as unreadable.
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
        logger.warning(f"{story}; it is replaced")
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
    """Run one process: build the requested batches until the pipe closes or process ``parent`` has ended."""
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
    except (EOFError, OSError):  # the main process has closed the pipe, or has ended
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
    """Describe how a process ended."""
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


def set_up_process() -> None:
    """Limit this process to one thread and ignore the stop signals, pending ones included.

    On Linux the process is killed when its parent ends for any reason, even while it is stopped or waits for a disk;
    otherwise it would hold its memory, including pages pinned for a GPU, forever.
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
    """Make the kernel kill this process when the thread that started it ends (Linux only; no effect elsewhere)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def set_up_worker(worker_id: int) -> None:
    """Set up a worker of a torch DataLoader; in the main process (no workers), set only the number of threads."""
    if torch.utils.data.get_worker_info() is None:
        torch.set_num_threads(1)
    else:
        set_up_process()


@contextmanager
def stop_signals_held_back() -> Iterator[None]:
    """Block the stop signals while a process is started, and in the process until :func:`set_up_process`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def at_most_cores(num_workers: int) -> int:
    """Return ``num_workers``, limited to the number of cores available to this process (more would only use memory)."""
    cores = num_cores()
    if num_workers > cores:
        logger.info(f"data-loading processes: {cores} instead of {num_workers}, because there are {cores} cores")
    return min(num_workers, cores)


def workers_of_choice(num_workers: int | str, cores: int) -> int:
    """Return ``num_workers``; for "auto", the ``cores`` of this process, at most ``AutoWorkers.LIMIT``."""
    return min(cores, AutoWorkers.LIMIT) if num_workers == "auto" else num_workers


class AutoWorkers:
    """Choose the number of processes from the durations of a batch and a step: enough to keep up, plus one.

    Start with ``first`` and decide after ``STEPS`` steps, of which the first ``WARM_UP`` are ignored. The maximum is
    ``most``: this rank's share of the CPU cores, ``cores``, at most ``LIMIT`` (a process uses two batches of memory).
    """

    WARM_UP, STEPS, LIMIT = 3, 10, 16

    def __init__(self, batch_size: int, cores: int | None = None):
        self.batch_size = batch_size
        self.most = min(self.LIMIT, cores or num_cores())
        self.chosen = self.first = min(2, self.most)
        self._seen: list[tuple[float, float]] = []

    def observe(self, build_s: float, step_s: float) -> bool:
        """Record the durations of a batch and its step; return whether ``chosen`` has just been decided."""
        if len(self._seen) >= self.STEPS:
            return False
        self._seen.append((build_s, step_s))
        if len(self._seen) < self.STEPS:
            return False
        build_s, step_s = (statistics.median(times) for times in zip(*self._seen[self.WARM_UP :], strict=True))
        self.chosen = min(self.most, math.ceil(build_s / max(step_s, 1e-6)) + 1)
        logger.info(
            f"data-loading processes: {max(self.chosen, self.first)} (train.num_workers=auto): one loads "
            f"{self.batch_size / build_s:,.0f} images/s, a step uses {self.batch_size / max(step_s, 1e-6):,.0f} "
            f"images/s, {self.most} cores for this rank"
        )
        return True


def open_ring(builder: Any, num_workers: int, first: int, *, pinned: bool = False, **options: Any) -> Any:
    """Return a :class:`Ring` that builds batches from ``first`` on, or :class:`InProcess` for 0 workers."""
    if num_workers == 0:
        return InProcess(builder, first)
    return (PinnedRing if pinned else Ring)(builder, num_workers, first, **options)


class InProcess:
    """A :class:`Ring` without processes: build each batch in this process on request."""

    def __init__(self, builder: Any, first_iteration: int):
        self.builder = builder
        self.iterations = itertools.count(first_iteration)
        self.arrays = allocate(builder.fields)

    def next_batch(self) -> Built:
        start = time.perf_counter()
        report = self.builder.build(next(self.iterations), self.arrays)
        return Built(0, self.arrays, report, time.perf_counter() - start)

    def release(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


class PinnedRing(Ring):
    """A :class:`Ring` with pinned slots, from which CUDA copies directly; if pinning fails, CUDA uses its own buffers.

    A slot is pinned when its first batch is ready: with fewer processes than ``max_workers``, most slots never are.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._pinned: dict[int, int] = {}  # slot -> its address
        self._can_pin = True

    def next_batch(self) -> Built:
        built = super().next_batch()
        if self._can_pin and built.slot not in self._pinned:
            self._pin(built.slot)
        return built

    def _pin(self, slot: int) -> None:
        place: np.ndarray = self.slots.bytes_of(slot)
        error = int(torch.cuda.cudart().cudaHostRegister(place.ctypes.data, place.nbytes, 0))
        if not error:
            self._pinned[slot] = place.ctypes.data
            return
        self._can_pin = False
        _clear_cuda_error()
        logger.info(f"batches are copied once more, because memory could not be pinned (CUDA error {error})")

    def close(self) -> None:
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.popitem()[1])
        super().close()


def _clear_cuda_error() -> None:
    """Clear CUDA's last error after a failed call; otherwise the next kernel launch would raise it."""
    try:
        torch.ones((), device="cuda")
    except RuntimeError:
        pass
