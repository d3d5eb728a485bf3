"""A thread beside the training that notices when a process of the job is gone or makes no more steps, and says which.

How a job ends that cannot go on, in this order:

1. Every process's thread writes a sign of life, a beat, into the process's file (``ranks.py``), with where its main
   thread is and whether it waits for the others. It never stops to wait for anything itself.
2. A thread whose main thread makes no step for too long looks for a new beat of all other processes. If its main thread
   goes on meanwhile, nothing was wrong. Without a new beat are those that the system holds (SIGSTOP), which it asks the
   system, and those that show none in ``GRACE_S``.
3. The first thread to come to an end of this says it in the run's log. The others wait until that is done. Only then
   does anyone kill the stopped processes of its machine, and leave with ``LOST_PROCESS``.
4. A process whose main thread finds the connection to another one broken (``faults.translate``) repeats what was said,
   or says itself who is gone.
5. All this is in files. Where their file system does not answer, a second thread, which touches none, leaves with
   ``LOST_PROCESS`` and says so on the terminal.

Nothing of it needs a collective, a GPU or a working main thread. Read :meth:`Watch._look` first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinov2_custom import distributed
from dinov2_custom.errors import LOST_PROCESS, reason_of
from dinov2_custom.train.ranks import Ranks, describe_end_of, has_ended, is_here, is_stopped

logger = logging.getLogger("dinov2")
LOOK_S = 2.0  # between looks for processes of this machine that are gone
GRACE_S = 10.0  # for a process that notices by itself, with an error that says more; for a beat on a busy machine
LEAVE_S = 2.0  # for the last words on the terminal, which the main thread may hold
# Where our own code waits for the other processes, besides everything below torch.distributed. With nccl, it is the
# device that does; the process waits for that where it reads numbers.
_WAITS = ("parallel.py", "sharding.py", "centering.py", "step_guard.py", "sinkhorn.py", "distributed.py")
_WAITS += ("transfer.py", "smoothed_value.py")
_PACKAGE = Path(__file__).resolve().parents[1]


class Watch:
    """While entered, report a lost or hanging process in the run's log and end this one with ``LOST_PROCESS``.

    Time in which the system holds all of this process does not count, so a job may be suspended and resumed.

    Args:
        run: the run directory, seen by all processes.
        hang_s: seconds without a step, three times that for the first one and for saves, after which the job hangs;
            0: never.
    """

    def __init__(self, run: Path, hang_s: float) -> None:
        self.hang_s = hang_s
        self.rank, self.size = distributed.get_global_rank(), distributed.get_global_size()
        token = secrets.token_hex(4)
        if self.rank == 0:
            Ranks(run, 0, token).clear()
        self.ranks = Ranks(run, self.rank, distributed.broadcast_object(token))
        self.iteration: int | None = None
        self._beat_s = min(max(hang_s / 16, 0.2), 30.0) if hang_s else 30.0
        self._seconds = 0.0  # of this watch, as far as the thread saw them go by
        self._marked, self._allowed_s = 0.0, 3 * hang_s
        self._beats = 0
        self._known: dict[int, dict[str, Any]] = {}  # the other processes' first words
        self._gone_since: float | None = None
        self._suspected: tuple[float, float, list[Any]] | None = None  # mark, when, beats before
        self._ended, self._ending = threading.Event(), threading.Lock()
        self._main_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._rounds = self._marks = 0

    def __enter__(self) -> Watch:
        self._beat()
        self._thread.start()
        if self.hang_s:
            threading.Thread(target=self._look_out, name="watch the watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._ending:  # a thread that has begun to end the job does so
            self._ended.set()
        self._thread.join()
        if kind is None:
            self.ranks.remove()
            return
        with contextlib.suppress(OSError):  # a full disk, say; what ends the run is the error that is on its way
            self.ranks.write({"died": f"{kind.__name__}: {reason_of(error)}"})

    def mark(self, iteration: int, patience: int = 1) -> None:
        """Note that the main thread is at work on ``iteration``; ``patience`` times the usual seconds are all right."""
        if self.iteration is not None:
            self._allowed_s = patience * self.hang_s
        self.iteration, self._marked = iteration, self._seconds
        self._marks += 1

    def _watch(self) -> None:
        tick_s = min(LOOK_S, self._beat_s)
        last, next_beat = time.monotonic(), self._beat_s
        while not self._ended.wait(tick_s):
            now = time.monotonic()
            self._seconds += min(now - last, 4 * tick_s)
            last = now
            try:
                has_beaten = self._seconds >= next_beat
                if has_beaten:
                    next_beat = self._seconds + self._beat_s
                    self._beat()
                self._look(has_beaten)
            except OSError as e:  # the file system; training itself may well go on
                logger.debug(f"watch: {e}")
            self._rounds += 1

    def _look_out(self) -> None:
        """End this process when neither its main thread nor the watching one comes back for too long."""
        tick_s = min(LOOK_S, self._beat_s)
        before, still_s, last = (-1, -1), 0.0, time.monotonic()
        while self._thread.is_alive():
            self._thread.join(tick_s)
            now, seen = time.monotonic(), (self._rounds, self._marks)
            still_s = still_s + min(now - last, 4 * tick_s) if seen == before else 0.0
            before, last = seen, now
            if still_s > max(self._allowed_s, GRACE_S):
                break
        else:
            return
        words = (
            f"no step for {self._allowed_s:g} s (train.hang_timeout): rank {self.rank} hangs {_place(self._state())}"
        )
        words += f", and the file system of {self.ranks.run} does not answer"
        advice = "once it does, the same command goes on from the newest checkpoint"
        _try_for(LEAVE_S, lambda: _take_leave(f"error: {words}; {advice}"))
        os._exit(LOST_PROCESS)

    def _look(self, has_beaten: bool) -> None:
        """End the job if it cannot go on; look at the others' files only after a beat, which is seldom enough."""
        if has_beaten or not self._known:
            self._meet()
        gone = self._gone()
        if not gone:
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = self._seconds
        elif self._seconds - self._gone_since > GRACE_S:
            self._end("; ".join(gone))
        if gone or not has_beaten:
            return
        marked = self._marked
        if not self.hang_s or self._seconds - marked <= self._allowed_s:
            self._suspected = None
        elif self._suspected is None or self._suspected[0] != marked:
            self._suspected = marked, self._seconds, [state.get("beat") for state in self._states()]
        else:
            self._judge(*self._suspected)

    def _judge(self, marked: float, since: float, before: list[Any]) -> None:
        """End the hanging job once every process has shown a new beat, or shows none."""
        states = self._states()
        held = [r for r in range(self.size) if r != self.rank and is_stopped(states[r])]
        silent = [
            r for r in range(self.size) if r != self.rank and r not in held and states[r].get("beat") == before[r]
        ]
        if silent and self._seconds - since <= max(2.5 * self._beat_s, GRACE_S):
            return
        lines = [f"no step for {self._allowed_s:g} s (train.hang_timeout) at iteration={self.iteration}"]
        lines += [f"rank {r} hangs: it is stopped (SIGSTOP, a debugger), last {_place(states[r])}" for r in held]
        lines += [f"rank {r} hangs: it does not even beat any more, last {_place(states[r])}" for r in silent]
        others = [r for r in range(self.size) if r not in held and r not in silent]
        waiting = [r for r in others if states[r].get("waits")]
        if not (held or silent):
            lines += [f"rank {r} hangs {_place(states[r])}" for r in others if r not in waiting]
        lines += [f"rank {r} waits for the others {_place(states[r])}" for r in waiting]
        if self._marked == marked:
            self._end("; ".join(lines), [states[r] for r in (*held, *silent)])

    def _end(self, text: str, stopped: list[dict[str, Any]] | None = None) -> None:
        """Have it said once for the whole job, then leave at once: the main thread may be beyond reach.

        ``stopped`` processes on this machine are killed, since no launcher's SIGTERM would end them.
        """
        with self._ending:
            if self._ended.is_set():  # the main thread came to an end by itself
                return
            try:
                is_ours = self.ranks.tell_once(text)
            except OSError as e:  # a full disk must not keep a hanging job alive
                is_ours, text = True, f"{text} (not in the log: {e.strerror})"
            _try_for(LEAVE_S, lambda: _take_leave(f"error: {text}" if is_ours else ""))
            for state in stopped or []:
                if is_here(state):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(state["pid"], signal.SIGKILL)
            os._exit(LOST_PROCESS)

    def _meet(self) -> None:
        """Read who the others are, once each; those of this machine are looked after from then on."""
        for rank in range(self.size):
            if rank != self.rank and rank not in self._known and (state := self.ranks.read(rank)):
                self._known[rank] = state

    def _gone(self) -> list[str]:
        """Say what became of the processes of this machine that are no more."""
        ended = [self.ranks.read(rank) for rank, state in self._known.items() if has_ended(state)]
        return [describe_end_of(state) for state in ended if state]  # without a file: it was done

    def _states(self) -> list[dict[str, Any]]:
        return [self._state() if rank == self.rank else self.ranks.read(rank) for rank in range(self.size)]

    def _state(self) -> dict[str, Any]:
        place, waits = _where(sys._current_frames().get(self._main_thread))
        return {"iteration": self.iteration, "where": place, "waits": waits, "beat": self._beats}

    def _beat(self) -> None:
        self._beats += 1
        self.ranks.write(self._state())


def _take_leave(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)
    logging.shutdown()


def _try_for(seconds: float, action: Callable[[], Any]) -> None:
    """Call ``action`` in a thread of its own and wait for it that long; the main thread may hold a lock for ever."""
    thread = threading.Thread(target=action, daemon=True)
    with contextlib.suppress(RuntimeError):  # no more threads to be had
        thread.start()
        thread.join(seconds)


def _where(frame) -> tuple[str, bool]:
    """Return the innermost place in this package, and whether it waits for other processes there."""
    waits = False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        waits |= "torch/distributed/" in path.as_posix()
        if _PACKAGE in path.parents:
            waits |= path.name in _WAITS
            return f"in {path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "in an unknown place", waits


def _place(state: dict[str, Any]) -> str:
    if not state:
        return "(no sign of it)"
    return f"{state.get('where', '')} at iteration={state.get('iteration')} (pid {state.get('pid', os.getpid())})"
