"""A thread beside the training that notices when a process of the job is gone or makes no more steps, and says which.

Every process keeps a small file in ``<run>/logs/ranks``: who it is, how far, where its main thread is, whether it waits
for the others. Nothing of it needs a collective, a GPU or a working main process. Read :meth:`Watch._look` first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dinov2_custom import distributed
from dinov2_custom.exit_codes import LOST_PROCESS
from dinov2_custom.train.faults import append_to_main_log

logger = logging.getLogger("dinov2")
FOLDER = Path("logs") / "ranks"
LOOK_S = 2.0  # between looks for processes of this machine that are gone
GRACE_S = 10.0  # for a process that notices by itself, with an error that says more
# Where our own code waits for the other processes, besides everything below torch.distributed.
_WAITS = ("parallel.py", "sharding.py", "centering.py", "step_guard.py", "sinkhorn.py", "distributed.py")
_PACKAGE = Path(__file__).resolve().parents[1]


class Watch:
    """While entered, report a lost or hanging process in the run's log and end this one with ``LOST_PROCESS``.

    Args:
        run: the run directory, seen by all processes.
        hang_s: seconds without a step, three times that for the first one and for saves, after which the job hangs;
            0: never.
    """

    def __init__(self, run: Path, hang_s: float) -> None:
        self.run, self.hang_s = Path(run), hang_s
        self.rank, self.size = distributed.get_global_rank(), distributed.get_global_size()
        self.token = distributed.broadcast_object(secrets.token_hex(4))  # files of an earlier start do not count
        self.iteration: int | None = None
        self._marked, self._allowed_s = time.monotonic(), 3 * hang_s
        self._beats = 0
        self._ended = threading.Event()
        self._main_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        (self.run / FOLDER).mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._file(self.rank).unlink(missing_ok=True)
            return
        with contextlib.suppress(OSError):  # a full disk, say; what ends the run is the error that is on its way
            self._write({"died": f"{kind.__name__}: {error}".partition("\n")[0]})

    def mark(self, iteration: int, patience: int = 1) -> None:
        """Note that the main thread is at work on ``iteration``; ``patience`` times the usual seconds are all right."""
        if self.iteration is not None:
            self._allowed_s = patience * self.hang_s
        self.iteration, self._marked = iteration, time.monotonic()

    def _watch(self) -> None:
        beat_s = min(max(self.hang_s / 16, 0.2), 30.0) if self.hang_s else 30.0
        next_beat = time.monotonic() + beat_s
        while not self._ended.wait(min(LOOK_S, beat_s)):
            try:
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + beat_s
                    self._beat()
                self._look()
            except OSError as e:  # the file system; training itself may well go on
                logger.debug(f"watch: {e}")

    def _look(self) -> None:
        gone = {rank: text for rank in range(self.size) if (text := self._gone(rank))}
        if gone:
            if not self._ended.wait(GRACE_S):
                self._end("lost", "; ".join(gone.values()))
        elif self.hang_s and time.monotonic() - self._marked > self._allowed_s:
            seen = [self._read(rank) for rank in range(self.size)]
            # a live process shows another beat by then, on a busy machine too
            if not self._ended.wait(max(2.5 * min(self.hang_s / 16, 30.0), 1.0)):
                self._end("hang", *self._describe_hang(seen))

    def _describe_hang(self, before: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
        """Return who hangs and who waits, and what is known of the processes that do not even beat."""
        now = [self._read(rank) for rank in range(self.size)]
        now[self.rank] = self._state()
        stopped = [r for r in range(self.size) if r != self.rank and now[r].get("beat") == before[r].get("beat")]
        busy = [r for r in range(self.size) if r not in stopped and not now[r].get("waits")]
        lines = [f"no step for {self._allowed_s:g} s (train.hang_timeout) at iteration={self.iteration}"]
        lines += [f"rank {r} hangs: it does not even beat any more, last {_place(now[r])}" for r in stopped]
        lines += [f"rank {r} hangs {_place(now[r])}" for r in (busy if not stopped else [])]
        rest = [r for r in range(self.size) if r not in stopped and r not in busy]
        lines += [f"rank {r} waits for the others {_place(now[r])}" for r in rest]
        return "; ".join(lines), [now[r] for r in stopped]

    def _end(self, kind: str, text: str, stopped: list[dict[str, Any]] | None = None) -> None:
        """Say it once for the whole job, and leave at once: the main thread may be beyond reach.

        ``stopped`` processes on this machine are killed, since no launcher's SIGTERM would end them.
        """
        with contextlib.suppress(FileExistsError):
            try:
                os.close(os.open(self.run / FOLDER / f"{kind}_{self.token}", os.O_CREAT | os.O_EXCL))
                append_to_main_log(self.run, f"{text}; the same command goes on from the newest checkpoint")
            except FileExistsError:
                raise
            except OSError as e:  # a full disk must not keep a hanging job alive
                text = f"{text} (not in the log: {e.strerror})"
            print(f"error: {text}", file=sys.stderr, flush=True)
        for state in stopped or []:
            if state.get("machine") == machine():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(state["pid"], signal.SIGKILL)
        logging.shutdown()
        os._exit(LOST_PROCESS)

    def _gone(self, rank: int) -> str:
        """Say what became of a process of this machine that is no more, "" while it lives or nothing is known."""
        state = self._read(rank)
        if rank == self.rank or state.get("machine") != machine() or _is_alive(state["pid"]):
            return ""
        return describe_end_of(state)

    def _state(self) -> dict[str, Any]:
        place, waits = _where(sys._current_frames().get(self._main_thread))
        return {"iteration": self.iteration, "where": place, "waits": waits, "beat": self._beats}

    def _beat(self) -> None:
        self._beats += 1
        self._write(self._state())

    def _write(self, state: dict[str, Any]) -> None:
        identity = {"rank": self.rank, "token": self.token, "machine": machine(), "pid": os.getpid()}
        temporary = self._file(self.rank).with_suffix(".tmp")
        temporary.write_text(json.dumps(identity | {"host": socket.gethostname()} | state))
        os.replace(temporary, self._file(self.rank))

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            state = json.loads(self._file(rank).read_text())
        except (OSError, ValueError):
            return {}
        return state if state.get("token") == self.token else {}

    def _file(self, rank: int) -> Path:
        return self.run / FOLDER / f"rank{rank}"


def describe_lost(run: Path) -> str:
    """Return which processes of the newest job in ``run`` are gone, "" if nothing is known."""
    ends = []
    for file in sorted((Path(run) / FOLDER).glob("rank*")):
        try:
            state = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        here = state.get("machine") == machine()
        if state.get("pid") != os.getpid() and ("died" in state or (here and not _is_alive(state["pid"]))):
            ends.append(describe_end_of(state))
    return "; ".join(ends)


def describe_end_of(state: dict[str, Any]) -> str:
    who = f"rank {state['rank']} (pid {state['pid']} on {state['host']})"
    if "died" in state:
        return f"{who} ended with {state['died']}"
    return f"{who} is gone without a word, killed from outside perhaps (out of memory: see dmesg)"


def machine() -> str:
    """Name what process numbers are unique in: a host's boot, a container's namespace."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # one that nobody has buried yet counts as dead
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


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
