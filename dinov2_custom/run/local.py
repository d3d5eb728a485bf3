"""Run processes on this machine with torchrun, and return the exit code of the process that failed first.

``python -m dinov2_custom.run.local`` accepts torchrun's arguments, also for one of several nodes.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import environment_variables

from dinov2_custom import errors
from dinov2_custom.configs.paths import missing_folders, remove_empty
from dinov2_custom.errors import COLLAPSED, LaunchError
from dinov2_custom.run.process import VARIABLE, Process, to_variable
from dinov2_custom.world import num_cores

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2"


def launch(task_class: type, args: argparse.Namespace, processes: int) -> int:
    """Run ``task_class(args)`` in ``processes`` processes and return the overall exit code.

    Rank 0 prints to this terminal, the others to ``local_<rank>_log.out`` and ``.err`` in ``args.output_dir``.
    """
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry

    folder = Path(args.output_dir)
    missing = missing_folders(folder)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // processes)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous_handler_registry.register("loopback", _loopback)
    flags = ["--nnodes=1", f"--nproc-per-node={processes}", "--rdzv-backend=loopback", "--rdzv-endpoint=127.0.0.1:0"]
    flags += [f"--log-dir={os.devnull}"]  # otherwise torch makes a folder that a killed launcher leaves behind
    _take_errors(folder)  # left by a launcher that was killed
    with environment_variables(**{VARIABLE: to_variable(Process(task_class, args))}):
        code, failures = run([*flags, "--module", "dinov2_custom.run.process", f"{folder}/local"])
    errors = _take_errors(folder)
    if failures:
        _explain(failures[0], errors, folder)
    if folder in missing and folder.is_dir() and not (folder / "logs").exists():  # it ended before the run started
        for file in folder.glob("local_*_log.*"):
            file.unlink()
        remove_empty(missing)
    return code


def _take_errors(folder: Path) -> dict[int, str]:
    """Return the error messages and tracebacks of failed processes, by rank, and remove their files."""
    errors = {}
    for path in folder.glob("local_*.error"):
        errors[int(path.stem.removeprefix("local_"))] = path.read_text(encoding="utf-8")
        path.unlink()
    return errors


def num_processes(args: argparse.Namespace) -> int:
    """Return ``args.ngpus``, or else the number of GPUs (at least 1; 1 with ``args.cpu``).

    Raises:
        LaunchError: if there are more processes than GPUs.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see submit.Task
    if args.cpu:
        return args.ngpus or 1
    import torch

    gpus = torch.cuda.device_count()
    if gpus and args.ngpus and args.ngpus > gpus:
        raise LaunchError(
            f"--ngpus: expected at most the {gpus} GPUs of this machine, got {args.ngpus}; lower it, or add --cpu to "
            "train without GPUs"
        )
    return args.ngpus or max(gpus, 1)


def run(arguments: Sequence[str]) -> tuple[int, list[Any]]:
    """Run torchrun with ``arguments``; return the overall exit code and the failures, the original cause first.

    Signals are forwarded to every process, which then saves and ends; when one process dies, the others are ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import main as torchrun

    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    wanted = {"--signals-to-handle": _SIGNALS, "--shutdown-timeout": "1800"}  # the second needs torch > 2.10
    flags = [f"{flag}={value}" for flag, value in wanted.items() if flag in known]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # our own message reports the failure
    handlers = {signum: signal.getsignal(signum) for signum in map(signal.Signals.__getitem__, _SIGNALS.split(","))}
    try:
        torchrun([*flags, *arguments])
    except ChildFailedError as e:
        failures = by_cause(e.failures.values())
        return errors.to_shell_code(failures[0].exitcode), failures
    except SignalException as e:
        return errors.stopped_by(int(e.sigval)), []
    finally:  # torch does not restore the handlers
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return errors.DONE, []


def by_cause(failures: Iterable[Any]) -> list[Any]:
    """Return torchrun's failures, the one that caused the others first.

    torchrun polls its processes, so it may report one that lost its peer, or that it stopped itself, before the one
    that ended first. A killed process makes others crash.
    """
    order = ["killed", "ended", *errors.CONSEQUENCES]

    def kind(failure: Any) -> Any:
        code = failure.exitcode
        return code if code in errors.CONSEQUENCES else "killed" if code < 0 else "ended"

    return sorted(failures, key=lambda failure: (order.index(kind(failure)), failure.timestamp))


def _loopback(params: Any) -> Any:
    """Return a rendezvous for the processes of this machine that listens on the loopback interface only."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class Loopback(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return params.backend

    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    rendezvous = Loopback(host, port, rank=0, world_size=1, run_id=params.run_id, timeout=600)
    # a store that opens its own port listens on all interfaces
    rendezvous._store = TCPStore(host, port, is_master=True, multi_tenant=True, master_listen_fd=listener.detach())
    return rendezvous


def _explain(failure: Any, errors: dict[int, str], folder: Path) -> None:
    """Print which rank ended the run, or its error, unless rank 0 has printed why it ended, or a signal stopped it.

    Args:
        errors: error messages and tracebacks by rank.
    """
    sentences = {rank: text for rank, text in errors.items() if not text.startswith("Traceback ")}
    if sentences:
        if 0 not in sentences:
            print(f"error: {sentences[min(sentences)]}", file=sys.stderr)
        return
    rank, code = failure.local_rank, failure.exitcode
    if code > 128 or code == COLLAPSED:
        return
    end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    words = f"rank {rank} {end}, the other processes were stopped"
    output = f"; see {folder}/local_{rank}_log.err" if rank else ""
    log = folder / "logs" / "log.txt"
    if log.is_file():
        output = output or f"; see {log}"
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{words}\n")
    print(f"error: {words}{output}; run the same command to resume from the newest checkpoint", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:])[0])
