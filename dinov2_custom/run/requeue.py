"""After the processes of a SLURM job have ended: requeue the job if there is more to do.

``python -m dinov2_custom.run.requeue RUN_DIRECTORY MARKER CODE``, the last line of the batch script. MARKER is what
``last_checkpoint`` held before, CODE what the job ended with if it did not come to start the run, else "". There is no
limit on the number of attempts, but each has to get somewhere: one that ended by itself, or at the time limit, without
a new checkpoint is the last. Torch-free. Read :func:`decide` first.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2_custom.exit_codes import stopped_by
from dinov2_custom.run import outcome
from dinov2_custom.run.outcome import Outcome

_LIMIT_SLACK_S = 90  # SLURM signals up to a minute before the time it was asked for
_WAIT_S = 60


@dataclass(frozen=True)
class Job:
    """What SLURM says of the job: its state, and the seconds left until the time limit."""

    state: str = "RUNNING"
    seconds_left: float = float("inf")
    signal_delay: int = 120


def decide(outcomes: Sequence[Outcome], num_ranks: int, progressed: bool, job: Job) -> tuple[bool, str]:
    """Return whether to requeue, and the reason in words.

    Args:
        outcomes: of those of the ``num_ranks`` processes that lived to write one.
        progressed: whether there is a newer checkpoint than at the start of this attempt.
    """
    kinds = {ended.kind for ended in outcomes}
    codes = {ended.code for ended in outcomes if ended.kind == "stopped"}
    if job.state != "RUNNING":
        state = job.state.lower()
        return False, f"SLURM says {state}; it starts again if SLURM requeued it, after scancel it does not"
    if "refused" in kinds:
        return False, "it ended with an error that another attempt would meet again"
    if "done" in kinds:
        return False, "the run is complete"
    if stopped_by(signal.SIGINT) in codes:
        return False, "it was interrupted by hand"
    if progressed:
        # after a death srun sends SIGTERM to the others, which then may call themselves stopped without having saved
        saved = kinds == {"stopped"} and len(outcomes) == num_ranks
        return True, "stopped after a save" if saved else "it died, and goes on from its last checkpoint"
    if "crashed" in kinds:
        return False, "it crashed before it wrote a checkpoint; see the error above or in logs/log.txt"
    if job.seconds_left < job.signal_delay + _LIMIT_SLACK_S:
        return False, "the time limit is too short to reach a checkpoint; raise --timeout or lower checkpointing.period"
    if len(outcomes) == num_ranks:  # else srun sent the signal, after one of them had died of something else
        return True, "stopped by a signal"
    return False, "a process was killed before there was a checkpoint"


def causes(outcomes: Sequence[Outcome], num_ranks: int, output: str) -> list[str]:
    """Return why the processes ended before the run did, a line for each different reason.

    Args:
        output: path that ``_<rank>_log.err`` is added to.
    """
    said = [f"error: {ended.message}" for ended in outcomes if ended.kind == "refused" and ended.message]
    for ended in outcomes:
        if ended.kind == "crashed":
            last = (ended.message.rstrip().splitlines() or ["no message"])[-1]
            said.append(f"error: rank {ended.rank}: {last}; the traceback: {output}_{ended.rank}_log.err")
    silent = sorted(set(range(num_ranks)) - {ended.rank for ended in outcomes})
    if silent and not said:
        ranks = ", ".join(map(str, silent))
        said = [
            f"error: killed without a last word, as for lack of memory (--mem): rank {ranks}; what was printed: "
            f"{output}_{silent[0]}_log.err"
        ]
    return list(dict.fromkeys(said))


def describe_job(text: str, now: float) -> Job:
    """Read the output of ``scontrol show job``."""
    fields = dict(re.findall(r"(\w+)=(\S*)", text))
    end = fields.get("EndTime", "")
    left = float("inf")
    if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", end):
        left = time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S")) - now
    return Job(fields.get("JobState", "UNKNOWN"), left)


def requeue(job_id: str) -> str:
    """Ask SLURM to run the job again; return what it said against it, or "" after having waited for the end."""
    asked = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True)
    if asked.returncode:
        return " ".join((asked.stderr or asked.stdout).split())
    time.sleep(_WAIT_S)  # SLURM ends this process, which must not end first: the job would count as finished
    return ""


def main(arguments: Sequence[str]) -> int:
    """Decide and act; return the job's exit code, which only matters where it is not requeued."""
    folder, before, code = Path(arguments[0]), arguments[1], arguments[2]
    job_id = os.environ["SLURM_JOB_ID"]
    marker = folder / "last_checkpoint"
    progressed = marker.exists() and marker.read_text(encoding="utf-8").strip() != before.strip()
    num_ranks = int(os.environ["SLURM_NTASKS"])
    outcomes = outcome.read(Path(os.environ[outcome.FOLDER_VARIABLE]))
    if code:
        outcomes = [Outcome(rank, "stopped", int(code)) for rank in range(num_ranks)]
    shown = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True)
    job = describe_job(shown.stdout, time.time())
    again, why = decide(outcomes, num_ranks, progressed, job)
    if job.state == "RUNNING":  # else SLURM itself has killed them
        print("".join(f"{line}\n" for line in causes(outcomes, num_ranks, f"{folder}/{job_id}")), end="")
    shutil.rmtree(os.environ[outcome.FOLDER_VARIABLE], ignore_errors=True)
    verdict = "requeued" if again else "not requeued" if job.state == "RUNNING" else "ended from outside"
    print(f"job {job_id}: {verdict}: {why}", flush=True)
    refusal = requeue(job_id) if again else ""
    if refusal:
        print(f"error: job {job_id} could not be requeued: {refusal}; submit it again, it goes on from its checkpoint")
    return max((ended.code for ended in outcomes), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
