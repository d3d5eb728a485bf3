"""Heartbeat files shared by the ranks of a job, in ``<run>/logs/ranks``.

``rank<n>`` holds the identity, progress and error of process n; ``end_<token>`` names the process that is about to
write into the log why the job ends, ``told_<token>`` exists once that is written. The token is the job's own: files of
an earlier start do not count. No collective and no GPU is needed. Not here: when a job has to end (``watch.py``). Read
:class:`Ranks` first.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from dinov2_custom.files import atomic_write, parse_json_object
from dinov2_custom.train.faults import append_to_main_log

FOLDER = Path("logs") / "ranks"
TELL_S = 10.0  # for another process of the job to say why it ends


class Ranks:
    """The files of one job in the run directory ``run``, seen by process ``rank`` of it.

    Args:
        token: the same in all processes of the job, another one in every job.
    """

    def __init__(self, run: Path, rank: int, token: str) -> None:
        self.run, self.rank, self.token = Path(run), rank, token
        self.folder = self.run / FOLDER
        self.identity = {"rank": rank, "token": token, "machine": machine(), "pid": os.getpid()}
        self.identity |= {"started": (process(os.getpid()) or ("", ""))[1], "host": socket.gethostname()}

    def clear(self) -> None:
        """Make the folder, and remove from it what earlier jobs left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)

    def write(self, state: dict[str, Any]) -> None:
        """Replace this process's file by its identity and ``state``, in one piece."""
        _replace(self._file(self.rank), json.dumps(self.identity | state))

    def remove(self) -> None:
        """Remove this process's file: it is done."""
        self._file(self.rank).unlink(missing_ok=True)

    def read(self, rank: int) -> dict[str, Any]:
        """Return what process ``rank`` wrote, nothing if it did not in this job."""
        state = _read(self._file(rank))
        return state if state.get("token") == self.token else {}

    def tell_once(self, text: str) -> bool:
        """Have ``text``, or what another process of the job has to say, in the run's log before this returns.

        The first process that comes here writes; the others wait until it has, up to ``TELL_S``, and write too if it
        does not: it may have been killed. Return whether this process wrote.

        Raises:
            OSError: it could not.
        """
        told = self.folder / f"told_{self.token}"
        try:
            with open(self.folder / f"end_{self.token}", "x") as file:
                file.write(str(self.rank))
        except FileExistsError:
            deadline = time.monotonic() + TELL_S
            while time.monotonic() < deadline:
                if told.exists():
                    return False
                time.sleep(0.05)
        append_to_main_log(self.run, f"{text}; the same command goes on from the newest checkpoint")
        with contextlib.suppress(OSError):  # the log has it; others write it once more at worst
            _replace(told, text)
        return True

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank{rank}"


def describe_lost(run: Path) -> str | None:
    """Return what ended the job of this process, else which of its processes are gone, "" if none is.

    None if nothing is known of the others: this process has not written its file yet.
    """
    states = [_read(file) for file in sorted((Path(run) / FOLDER).glob("rank*"))]
    own = next((state for state in states if _is_own(state)), None)
    if own is None:
        return None
    with contextlib.suppress(OSError):
        return (Path(run) / FOLDER / f"told_{own['token']}").read_text()
    others = [state for state in states if state.get("token") == own["token"] and state is not own]
    return "; ".join(describe_end_of(state) for state in others if "died" in state or has_ended(state))


def describe_end_of(state: dict[str, Any]) -> str:
    """Say who is gone and, if it said so itself, why."""
    who = f"rank {state['rank']} (pid {state['pid']} on {state['host']})"
    if "died" in state:
        return f"{who} ended with {state['died']}"
    return f"{who} is gone without a word, killed from outside perhaps (out of memory: see dmesg)"


def has_ended(state: dict[str, Any]) -> bool:
    """Return whether the process that wrote ``state`` was one of this machine and is no more."""
    if not is_here(state):
        return False
    now, started = process(state["pid"]), state.get("started")
    return now is None or bool(started and now[1] and now[1] != started)  # the number may be another process's now


def is_stopped(state: dict[str, Any]) -> bool:
    """Return whether the process that wrote ``state`` is one of this machine, held by SIGSTOP or a debugger."""
    return is_here(state) and (process(state["pid"]) or ("",))[0] in ("T", "t")


def is_here(state: dict[str, Any]) -> bool:
    """Return whether the process that wrote ``state`` is or was one of this machine."""
    return state.get("machine") == machine()


def machine() -> str:
    """Name what process numbers are unique in: a host's boot, a container's namespace."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process(pid: int) -> tuple[str, str] | None:
    """Return the state letter and the start time of a process of this machine, "" where the system does not say.

    None: there is none, or one that is dead and not buried yet.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return None if fields[0] in ("Z", "X") else (fields[0], fields[19])


def _is_own(state: dict[str, Any]) -> bool:
    return state.get("pid") == os.getpid() and is_here(state) and not has_ended(state)


def _read(file: Path) -> dict[str, Any]:
    try:
        return parse_json_object(file.read_text())
    except (OSError, ValueError):
        return {}


def _replace(file: Path, text: str) -> None:
    with atomic_write(file, exclusive=True) as out:
        out.write(text)
