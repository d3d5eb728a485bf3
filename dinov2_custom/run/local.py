"""Run a task on this machine: in this process, or one process a GPU under torch elastic's process control.

A signal goes on to every process, which saves and ends; the first process that dies ends the others. Not here: several
machines (``slurm.py``, or torchrun on each). Read :func:`launch` first.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dinov2_custom import exit_codes
from dinov2_custom.configs.output_dir import missing_folders, remove_empty
from dinov2_custom.errors import LaunchError
from dinov2_custom.run import outcome, task
from dinov2_custom.run.outcome import Outcome

_FORWARDED = tuple(n for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, n))
_POLL_S = 0.1


def launch(task_class: type, args: argparse.Namespace, processes: int) -> int:
    """Run ``task_class(args)`` in ``processes`` processes and return the exit code of the whole.

    Rank 0 keeps this terminal; the others print to ``local_<rank>_log.out`` and ``.err`` in ``args.output_dir``.
    """
    spec = task.make_spec(task_class, args, f"{args.output_dir}/local", first_output=1)
    with tempfile.TemporaryDirectory(prefix="dinov2_launch_") as folder:
        before, told = missing_folders(Path(args.output_dir)), _told(Path(args.output_dir))
        codes = _run_processes(spec, processes, Path(folder))
        outcomes = outcome.read(Path(folder))
    _tidy(before, Path(args.output_dir))
    if new := [words for token, words in _told(Path(args.output_dir)).items() if token not in told]:
        rank, text = new[0]
        if rank:  # rank 0 has said it on this terminal
            print(f"error: {text}; the same command goes on from the newest checkpoint", file=sys.stderr)
        return exit_codes.LOST_PROCESS  # whatever the processes that hung were ended with
    return _conclude(codes, outcomes, args.output_dir)


def num_processes(args: argparse.Namespace) -> int:
    """Return ``args.ngpus``, else the number of GPUs, at least 1, with ``args.cpu`` 1.

    Raises:
        LaunchError: more processes than GPUs.
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


def _run_processes(spec: dict[str, Any], processes: int, folder: Path) -> dict[int, int]:
    """Run ``spec`` in all ranks; return the exit codes of those that failed, minus the signal for those killed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # _conclude says it in a sentence
    os.environ[outcome.FOLDER_VARIABLE] = str(folder)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": _free_port(), task.LAUNCHER: os.getpid()}
    arguments = ("-u", "-m", "dinov2_custom.run.task", json.dumps(spec))
    ranks = range(processes)
    with _signals_kept():
        context = start_processes(
            name="dinov2",
            entrypoint=sys.executable,
            args={rank: arguments for rank in ranks},
            envs={r: {k: str(v) for k, v in {**shared, "RANK": r, "LOCAL_RANK": r}.items()} for r in ranks},
            logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        )

        def forward(signum: int, frame) -> None:
            for pid in context.pids().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)

        for name in _FORWARDED:  # in place of torch's handlers, which wait 30 s for a save and then kill
            signal.signal(getattr(signal, name), forward)
        result = None
        while result is None:
            result = context.wait(timeout=_POLL_S, period=_POLL_S)
    return {rank: failure.exitcode for rank, failure in result.failures.items()}


@contextmanager
def _signals_kept() -> Iterator[None]:
    former = {name: signal.getsignal(getattr(signal, name)) for name in _FORWARDED}
    try:
        yield
    finally:
        for name, handler in former.items():
            signal.signal(getattr(signal, name), handler)


def _conclude(codes: dict[int, int], outcomes: Sequence[Outcome], output_dir: str) -> int:
    """Return the exit code of the whole; say which rank ended it, unless that rank's own words were seen here."""
    by_kind = {kind: [ended for ended in outcomes if ended.kind == kind] for kind in outcome.KINDS}
    told = {ended.rank for ended in outcomes}
    killed = [rank for rank, code in codes.items() if rank not in told and code not in exit_codes.CONSEQUENCES]
    if by_kind["refused"]:
        first = by_kind["refused"][0]
        if first.rank:
            print(f"error: {first.message}", file=sys.stderr)
        return first.code
    crashed = [ended.rank for ended in by_kind["crashed"]]
    if not killed and not crashed:
        ended = [*by_kind["lost"], *by_kind["stopped"]]
        return ended[0].code if ended else exit_codes.LOST_PROCESS if codes else exit_codes.DONE
    # a death by signal makes the others crash in their next exchange, or they are stopped by SIGTERM
    rank = [*killed, *crashed, *codes][0]
    code = codes.get(rank, exit_codes.ERROR)
    end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    words = f"rank {rank} {end}, the other processes were stopped"
    log = Path(output_dir) / "logs" / "log.txt"
    if log.is_file():
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{words}\n")
    output = f"; its output: {output_dir}/local_{rank}_log.err" if rank else ""
    print(f"error: {words}{output}; the same command goes on from the last checkpoint", file=sys.stderr)
    return exit_codes.as_a_shell_has_it(code)


def _told(run: Path) -> dict[str, tuple[int, str]]:
    """Return, by job, which rank said why the job ends itself, and the words; see ``train/ranks.py``."""
    folder, found = run / "logs" / "ranks", {}
    for path in folder.glob("told_*"):
        with suppress(OSError, ValueError):
            teller = (folder / path.name.replace("told_", "end_")).read_text()
            found[path.name] = int(teller), path.read_text()
    return found


def _tidy(missing_before: list[Path], folder: Path) -> None:
    """Remove the output files of a run that ended before it made a run directory."""
    if folder not in missing_before or not folder.is_dir() or (folder / "logs").exists():
        return
    for file in folder.glob("local_*_log.*"):
        file.unlink()
    remove_empty(missing_before)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
