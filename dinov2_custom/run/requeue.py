"""Decide, after the processes of a SLURM job have ended, whether the batch script requeues the job.

The number of attempts is unlimited, but a job is not requeued after an attempt that failed, or reached the time limit,
without a new checkpoint. Does not import torch.
"""

from __future__ import annotations

import os
import pickle
import re
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dinov2_custom.errors import ERROR, LOST_PROCESS, reason_of
from dinov2_custom.utils.run_folder import last_checkpoint

AGAIN = 200  # not used by any process
_LIMIT_SLACK_S = 90  # SLURM signals up to a minute before the requested time
_BY_HAND = 130  # SIGINT
Result = tuple[str, Any]  # ("success", exit code), or ("error", sentence or traceback)


class Job(NamedTuple):
    """State of the job in SLURM, and the seconds left until the time limit."""

    state: str = "RUNNING"
    seconds_left: float = float("inf")
    signal_delay: int = 120


def decide(results: Mapping[int, Result], num_ranks: int, progressed: bool, job: Job) -> tuple[bool, str]:
    """Return whether to requeue, and the reason in words.

    Args:
        results: by rank, for those of the ``num_ranks`` processes that wrote one.
        progressed: whether there is a newer checkpoint than at the start of the attempt.
    """
    codes = {value for kind, value in results.values() if kind == "success"}
    errors = [text for kind, text in results.values() if kind == "error"]
    crashed = [text for text in errors if _is_traceback(text)]
    if job.state != "RUNNING":
        state = job.state.lower()
        return False, f"SLURM reports {state}; it starts again if SLURM requeued it, but not after scancel"
    if len(crashed) < len(errors) or any(0 < code < 128 and code != LOST_PROCESS for code in codes):
        return False, "it ended with an error that another attempt would repeat"
    if 0 in codes:
        return False, "the run is complete"
    if _BY_HAND in codes:
        return False, "it was interrupted by the user"
    if progressed:
        # when a process dies, srun sends SIGTERM to the others, which may then report "stopped" without having saved
        saved = len(results) == num_ranks and not errors and LOST_PROCESS not in codes
        return True, "stopped after a save" if saved else "it died; the next attempt resumes from its last checkpoint"
    if crashed:
        return False, "it crashed before it wrote a checkpoint; see the error above or in logs/log.txt"
    if job.seconds_left < job.signal_delay + _LIMIT_SLACK_S:
        return False, "the time limit is too short to reach a checkpoint; raise --timeout or lower checkpointing.period"
    if len(results) == num_ranks and LOST_PROCESS not in codes:
        return True, "stopped by a signal"
    return False, "a process was killed before there was a checkpoint"


def causes(results: Mapping[int, Result], num_ranks: int, job_files: str) -> list[str]:
    """Return why processes ended before the run was complete, one line per distinct reason."""
    lines = []
    for rank, text in sorted((rank, text) for rank, (kind, text) in results.items() if kind == "error"):
        if _is_traceback(text):
            last = reason_of(text.rstrip().splitlines()[-1])
            text = f"rank {rank}: {last}; the traceback: {job_files}_{rank}_log.err"
        lines.append(f"error: {text}")
    killed = [rank for rank in range(num_ranks) if rank not in results]
    if killed and not lines:
        lines = [
            "error: killed without an error message, as for lack of memory (--mem): rank "
            f"{', '.join(map(str, killed))}; what was printed: {job_files}_{killed[0]}_log.err"
        ]
    return list(dict.fromkeys(lines))


def _is_traceback(text: str) -> bool:
    return text.startswith("Traceback ")


class _Plain(pickle.Unpickler):
    """Unpickle only text and numbers; a pickle cannot make this class call anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in a result")


def read(job_files: str) -> dict[int, Result]:
    """Return the results by rank.

    Truncated files, and files owned or writable by other users, are ignored.
    """
    results = {}
    prefix = Path(job_files)
    for path in prefix.parent.glob(f"{prefix.name}_*_result.pkl"):
        with suppress(OSError, ValueError, TypeError, EOFError, pickle.UnpicklingError), open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            if facts.st_uid == os.geteuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                kind, value = _Plain(file).load()
                rank = int(path.name.removeprefix(f"{prefix.name}_").partition("_")[0])
                results[rank] = str(kind), int(value) if kind == "success" else str(value)
    return results


def describe_job(text: str, now: float) -> Job:
    """Parse the output of ``scontrol show job``."""
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    left = float("inf")
    with suppress(ValueError):  # Unknown
        left = time.mktime(time.strptime(fields.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S")) - now
    return Job(fields.get("JobState", "UNKNOWN"), left, int(os.environ.get("DINOV2_SIGNAL_DELAY", "120")))


def main(arguments: Sequence[str]) -> int:
    """Print the causes and the decision; return ``AGAIN`` or the job's exit code.

    Args:
        arguments: the run directory; the path prefix of ``_<rank>_result.pkl``; the content of ``last_checkpoint``
            before this attempt; the exit code of the environment check (nonzero if a signal came before the processes
            started); the exit code of the processes; the output of ``scontrol show job``.
    """
    folder, job_files, before, checked, code, shown = arguments
    job_id, num_ranks = Path(job_files).name, int(os.environ["SLURM_NTASKS"])
    progressed = last_checkpoint(Path(folder)) not in ("", before.strip())
    results = read(job_files)
    if int(checked):
        results = {rank: ("success", int(checked)) for rank in range(num_ranks)}
    job = describe_job(shown, time.time())
    again, why = decide(results, num_ranks, progressed, job)
    if job.state == "RUNNING":  # otherwise SLURM killed the processes
        for line in causes(results, num_ranks, job_files):
            print(line)
    outcome = "requeued" if again else "not requeued" if job.state == "RUNNING" else "ended from outside"
    print(f"job {job_id}: {outcome}: {why}", flush=True)
    if again:
        return AGAIN
    return max([int(code), *(value if kind == "success" else ERROR for kind, value in results.values())])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
