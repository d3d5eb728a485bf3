"""Start commands and sources, as one process or several, and wait for their effects."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
CEILING_S = 600  # limit of any wait: a machine may be busy, and no test measures speed
GRACE_S = 30  # from the failure of one process until the others are killed
# As scripts in run/ end: a model at module level keeps its process group, whose threads must not meet Python's end.
LEAVE = "\nfrom dinov2_custom import entry\nentry.leave(0)\n"
# Modules that training imports, which takes two to four seconds of CPU time per process
LOADED = (
    "dinov2_custom.train.train", "torch._dynamo", "torch.distributed.fsdp", "dinov2_custom.embed",
    "dinov2_custom.eval.knn", "dinov2_custom.eval.linear", "dinov2_custom.eval.log_regression",
)  # fmt: skip


def torchrun(processes: int, *command: str) -> list[str]:
    """Return the command that starts ``command``, a script and its arguments, ``processes`` times."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]


class Job:
    """``command``, a script and its arguments, in one process or in several as under torchrun.

    The processes are forked off one that has loaded torch and the package and has computed nothing, which spares each
    the imports. Each is the leader of its own session.

    Args:
        command: what follows ``python``: a script, ``-m`` and a module or ``-c`` and a source, and arguments.
        processes: number of processes; None for one without a process group.
        log: receives the standard output and errors of all of them.
        errors: receives the standard errors instead.
        environment: all of it, with OMP_NUM_THREADS and, as its folders come first, PYTHONPATH.
    """

    def __init__(
        self,
        *command: str,
        log: str | Path = os.devnull,
        errors: str | Path | None = None,
        processes: int | None = None,
        cwd: str | Path = REPOSITORY,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        environment = dict(environment or os.environ | ENVIRONMENT)
        ranks = [{}]
        if processes is not None:  # the store is here, so that its port is free for certain
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            ranks = [_group(rank, processes, self._store.port) for rank in range(processes)]
        self.processes = [
            context.Process(target=_become, args=(command, environment | own, cwd, str(log), str(errors or log)))
            for own in ranks
        ]
        for process in self.processes:
            process.start()

    @property
    def pid(self) -> int:
        """Return the process id of the first process."""
        return self.processes[0].pid

    def poll(self) -> int | None:
        """Return the exit code, or minus the number of the signal that ended it; None while any process is running."""
        return None if self._running() else self._first_failure()

    def wait(self) -> int:
        """Wait for the end and return the exit code; the first process to fail ends the others, as under torchrun."""
        while (code := self._first_failure()) == 0 and (running := self._running()):
            assert wait([process.sentinel for process in running], CEILING_S), f"still running after {CEILING_S} s"
        for process in self._running():
            process.terminate()
            if state(process.pid) == "T":
                process.kill()  # stopped: it will not see the other signal
        for process in self.processes:
            process.join(GRACE_S)
        self.kill()
        for process in self.processes:
            process.join()
        return code

    def kill(self) -> None:
        """Kill the processes that are still running."""
        for process in self._running():
            process.kill()

    def _running(self) -> list[multiprocessing.Process]:
        return [process for process in self.processes if process.exitcode is None]

    def _first_failure(self) -> int:
        return next((process.exitcode for process in self.processes if process.exitcode), 0)


def _group(rank: int, size: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    return {name: str(value) for name, value in (place | elastic).items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _become(command: Sequence[str], environment: dict[str, str], cwd: str | Path, log: str, errors: str) -> None:
    """Run as ``python <command>`` would."""
    multiprocessing.set_start_method(None, force=True)  # Python's own again: multiprocessing hands its choice down
    os.setsid()
    os.chdir(cwd)
    sys.dont_write_bytecode = True
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for stream, path in ((1, log), (2, errors)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)
    # whole lines in one write, also under PYTHONUNBUFFERED: processes of a group share the file
    sys.stdout.reconfigure(line_buffering=True, write_through=False)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    first, *arguments = command
    try:
        if first == "-c":
            sys.argv, sys.path[:0] = ["-c", *arguments[1:]], [""]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        elif first == "-m":
            sys.argv, sys.path[:0] = arguments, [os.getcwd()]
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = list(command), [str(Path(first).resolve().parent)]
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def launch(processes: int, *command: str) -> subprocess.CompletedProcess:
    """Run ``command`` in ``processes`` processes, which must all exit with 0."""
    done = run(*command, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run(*command: str, **options) -> subprocess.CompletedProcess:
    """Run ``command`` to completion and return exit code, output and errors; ``options`` are those of Job."""
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder) / "log", Path(folder) / "errors"
        code = Job(*command, log=log, errors=errors, **options).wait()
        return subprocess.CompletedProcess(command, code, log.read_text(), errors.read_text())


def launch_source(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run ``source`` with ``arguments`` in two processes; write it into ``folder``."""
    script = folder / "two.py"
    script.write_text(source + LEAVE)
    return launch(2, str(script), *arguments)


def state(pid: int) -> str:
    """Return Linux's state letter of a process, or "" if it has ended.

    A zombie counts as ended: a container's init process may be slow to reap it.
    """
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if found in "ZX" else found


def children(process: subprocess.Popen | Job) -> list[int]:
    """Return the ids of the processes started by the main thread of ``process``."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def running(pids: Iterable[int]) -> list[int]:
    """Return those of ``pids`` that are still running."""
    return [pid for pid in pids if state(pid)]


def wait_until(condition: Callable[[], Any], what: str, of: Sequence[subprocess.Popen | Job] = ()) -> Any:
    """Return the first true result of ``condition()``; fail if a process in ``of`` ends first."""
    deadline = time.monotonic() + CEILING_S
    while not (found := condition()):
        assert all(process.poll() is None for process in of), f"a process ended before {what}"
        assert time.monotonic() < deadline, f"{what}: not in {CEILING_S} s"
        time.sleep(0.02)
    return found
