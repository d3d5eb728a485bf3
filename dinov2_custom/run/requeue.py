"""After the processes of a SLURM job have ended: decide whether the batch script requeues the job.

``python -m dinov2_custom.run.requeue FOLDER JOB_FILES MARKER CHECKED CODE SHOWN`` ends with ``AGAIN`` or the job's exit
code. MARKER is what ``last_checkpoint`` of the run directory FOLDER held before this attempt, CHECKED what the check of
the environment ended with, not 0 if a signal came before there were processes, CODE what those ended with, SHOWN what
``scontrol show job`` printed; JOB_FILES is the path that ``_<rank>_result.pkl`` is added to. There is no limit on
attempts, but each has to get somewhere: one that ended by itself, or at the time limit, without a new checkpoint is the
last. Torch-free. Read :func:`decide` first.
"""

from __future__ import annotations

import os
import pickle
import re
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2_custom.errors import ERROR, LOST_PROCESS
from dinov2_custom.utils.run_folder import last_checkpoint

AGAIN = 200  # no process ends with it
_LIMIT_SLACK_S = 90  # SLURM signals up to a minute before the time it was asked for
_BY_HAND = 130  # SIGINT
Result = tuple[str, Any]  # ("success", exit code), or ("error", sentence or traceback)


@dataclass(frozen=True)
class Job:
    """What SLURM says of the job: its state, and the seconds left until the time limit."""

    state: str = "RUNNING"
    seconds_left: float = float("inf")
    signal_delay: int = 120


def decide(results: Mapping[int, Result], num_ranks: int, progressed: bool, job: Job) -> tuple[bool, str]:
    """Return whether to requeue, and the reason in words.

    Args:
        results: by rank, of those of the ``num_ranks`` processes that lived to leave one.
        progressed: whether there is a newer checkpoint than at the start of this attempt.
    """
    codes = {value for kind, value in results.values() if kind == "success"}
    errors = [text for kind, text in results.values() if kind == "error"]
    crashed = [text for text in errors if _is_traceback(text)]
    if job.state != "RUNNING":
        state = job.state.lower()
        return False, f"SLURM says {state}; it starts again if SLURM requeued it, after scancel it does not"
    if len(crashed) < len(errors) or any(0 < code < 128 and code != LOST_PROCESS for code in codes):
        return False, "it ended with an error that another attempt would meet again"
    if 0 in codes:
        return False, "the run is complete"
    if _BY_HAND in codes:
        return False, "it was interrupted by hand"
    if progressed:
        # after a death srun sends SIGTERM to the others, which then may call themselves stopped without having saved
        saved = len(results) == num_ranks and not errors and LOST_PROCESS not in codes
        return True, "stopped after a save" if saved else "it died, and goes on from its last checkpoint"
    if crashed:
        return False, "it crashed before it wrote a checkpoint; see the error above or in logs/log.txt"
    if job.seconds_left < job.signal_delay + _LIMIT_SLACK_S:
        return False, "the time limit is too short to reach a checkpoint; raise --timeout or lower checkpointing.period"
    if len(results) == num_ranks and LOST_PROCESS not in codes:
        return True, "stopped by a signal"
    return False, "a process was killed before there was a checkpoint"


def causes(results: Mapping[int, Result], num_ranks: int, job_files: str) -> list[str]:
    """Return why the processes ended before the run did, a line for each different reason."""
    said = []
    for rank, (kind, text) in sorted(results.items()):
        if kind == "error" and _is_traceback(text):
            last = text.rstrip().splitlines()[-1]
            said.append(f"error: rank {rank}: {last}; the traceback: {job_files}_{rank}_log.err")
        elif kind == "error":
            said.append(f"error: {text}")
    silent = sorted(set(range(num_ranks)) - set(results))
    if silent and not said:
        ranks = ", ".join(map(str, silent))
        said = [
            f"error: killed without an error message, as for lack of memory (--mem): rank {ranks}; what was printed: "
            f"{job_files}_{silent[0]}_log.err"
        ]
    return list(dict.fromkeys(said))


def _is_traceback(text: str) -> bool:
    return text.startswith("Traceback ")


class _Plain(pickle.Unpickler):
    """Text and numbers alone: nothing in a pickle can make this call anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in a result")


def read(job_files: str) -> dict[int, Result]:
    """Return the results by rank.

    Those that are torn, of another owner or writable by others count as none.
    """
    results = {}
    prefix = Path(job_files)
    for path in prefix.parent.glob(f"{prefix.name}_*_result.pkl"):
        try:
            with open(path, "rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_uid == os.geteuid() and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    kind, value = _Plain(file).load()
                    rank = int(path.name.removeprefix(f"{prefix.name}_").partition("_")[0])
                    results[rank] = str(kind), int(value) if kind == "success" else str(value)
        except (OSError, ValueError, TypeError, EOFError, pickle.UnpicklingError):
            continue
    return results


def describe_job(text: str, now: float) -> Job:
    """Read the output of ``scontrol show job``."""
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    end = fields.get("EndTime", "")
    left = float("inf")
    if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", end):
        left = time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S")) - now
    return Job(fields.get("JobState", "UNKNOWN"), left, int(os.environ.get("DINOV2_SIGNAL_DELAY", "120")))


def main(arguments: Sequence[str]) -> int:
    """Print the causes and the decision; return ``AGAIN`` or the job's exit code."""
    folder, job_files, before, checked, code, shown = arguments
    job_id, num_ranks = Path(job_files).name, int(os.environ["SLURM_NTASKS"])
    progressed = last_checkpoint(Path(folder)) not in ("", before.strip())
    results = read(job_files)
    if int(checked):
        results = {rank: ("success", int(checked)) for rank in range(num_ranks)}
    job = describe_job(shown, time.time())
    again, why = decide(results, num_ranks, progressed, job)
    if job.state == "RUNNING":  # else SLURM itself has killed them
        print("".join(f"{line}\n" for line in causes(results, num_ranks, job_files)), end="")
    verdict = "requeued" if again else "not requeued" if job.state == "RUNNING" else "ended from outside"
    print(f"job {job_id}: {verdict}: {why}", flush=True)
    if again:
        return AGAIN
    return max([int(code), *(value if kind == "success" else ERROR for kind, value in results.values())])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
