"""Submit a job through submitit, and say in one sentence why SLURM refused it.

Not the script (``executor.py``), not the sentence (``refusal.py``). Torch-free. Read :func:`submit` first.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils as submitit_utils

from dinov2_custom.configs.paths import missing_folders, remove_empty
from dinov2_custom.errors import LaunchError
from dinov2_custom.run.args import RESERVED
from dinov2_custom.run.executor import JOB, PYTHON, script
from dinov2_custom.run.process import Process
from dinov2_custom.run.refusal import QUERY_TIMEOUT_S, ask, explain, is_silence, too_much
from dinov2_custom.world import TORCHRUN_VARIABLES

# reasons of a pending job that waiting does not change
_HOPELESS = (
    "PartitionConfig",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "InvalidAccount",
    "InvalidQOS",
    "BadConstraints",
    "WallDurationPerJobLimit",
    "can't use this partition",
    "not permitted to use this partition",
)
# what submitit leaves of a submission that failed
_LEFT = re.compile(r"[0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh")


def submit(parameters: dict[str, Any], output_dir: str, processes: Sequence[Process]) -> tuple[str, Path, str]:
    """Submit ``processes``, more than one as a job array; return (job number, folder of its files, state in words).

    Args:
        parameters: of submitit's SlurmExecutor.
        output_dir: absolute; ``%j`` becomes the job's number.

    Raises:
        LaunchError: SLURM refuses the job or will never start it; nothing is left behind then.
    """
    text = script(parameters, output_dir, len(processes))
    folder = submitit_utils.JobPaths.get_first_id_independent_folder(output_dir)
    made, before = missing_folders(folder), {path.name for path in folder.glob("*")}
    executor = submitit.SlurmExecutor(output_dir, python=PYTHON)
    executor.update_parameters(**parameters)
    job_id, refused = "", ""
    try:
        # submitit prints what sbatch complains of, beside raising it
        with _environment(_inherited(os.environ, text)), redirect_stderr(io.StringIO()):
            jobs = executor.submit_array(processes)
        job_id, shown = jobs[0].job_id.partition("_")[0], state(jobs[0].job_id.partition("_")[0])
        if any(reason in shown for reason in _HOPELESS):
            subprocess.run(["scancel", job_id], check=False)
            refused = f"the job could never start: {shown}"
    except (submitit_utils.FailedJobError, submitit_utils.FailedSubmissionError) as e:
        refused = str(e)
    files = Path(output_dir.replace(JOB, job_id))
    left = [path for path in folder.glob("*") if _LEFT.fullmatch(path.name) and path.name not in before]
    for path in left:  # links after a submission; another one may be under way
        if refused or (path.is_symlink() and path.readlink() == files / f"{job_id}_submission.sh"):
            path.unlink(missing_ok=True)
    if refused:
        for path in files.glob(f"{job_id}_*") if job_id else ():
            path.unlink()
        remove_empty([files, *made])
        raise LaunchError(explain(refused, text, _inherited(os.environ, text)))
    for path in files.glob(f"{job_id}_*submitted.pkl"):
        path.chmod(0o600)  # the job calls what is in it
    return job_id, files, shown


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def others_in(output_dir: Path) -> list[str]:
    """Return the jobs of this user, waiting or running, that were submitted to write into ``output_dir``."""
    known = {path.name.removesuffix("_submission.sh") for path in output_dir.glob("*_submission.sh")}
    if not known:
        return []
    listed = ask(["squeue", "--me", "--noheader", "--format", "%i %T"], os.environ).splitlines()
    return [line for line in listed if re.split("[_ ]", line)[0] in known]


def _inherited(environment: Mapping[str, str], text: str) -> dict[str, str]:
    """Leave out the variables of a job or launcher this process may be in, and those that win over the script."""
    special = {"TIME": "TIMELIMIT", "MEM": "MEM_PER_NODE", "ARRAY": "ARRAY_INX"}
    chosen = [*re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE), *RESERVED, "requeue", "no-requeue"]
    options = [name.upper().replace("-", "_") for name in chosen]
    foreign = {f"SBATCH_{special.get(name, name)}" for name in options} | set(TORCHRUN_VARIABLES)
    others = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "OMPI_", "PMI_", "PMIX_", "TORCHELASTIC_")
    return {
        name: value
        for name, value in environment.items()
        if name not in foreign and (not name.startswith(others) or name == "SLURM_CONF")
    }


def check_installed() -> None:
    """Look for SLURM's commands.

    Raises:
        LaunchError: not there.
    """
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        raise LaunchError(
            f"expected SLURM's commands on PATH, got no {', '.join(missing)}; log in to a cluster, load its module, or "
            "use --launcher local"
        )


def check_syntax(text: str) -> None:
    """Let bash read the script without running it.

    Raises:
        LaunchError: a ``--setup`` line that is no bash.
    """
    read = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    if read.returncode:
        reason = read.stderr.strip().splitlines()[0]
        raise LaunchError(
            f"--setup: expected lines of bash, got: {reason}; each --setup is one line, quoted for your shell"
        )


def foretell(text: str, environment: Mapping[str, str]) -> tuple[bool, str]:
    """Return whether SLURM would refuse the script ``text``, and why or when it could start, in a sentence."""
    inherited = _inherited(environment, text)
    command = ["sbatch", "--test-only"]
    try:
        asked = subprocess.run(
            command, input=text, capture_output=True, text=True, env=inherited, timeout=QUERY_TIMEOUT_S
        )
    except FileNotFoundError:
        return False, "SLURM was not asked: no sbatch on PATH"
    except (OSError, subprocess.TimeoutExpired) as e:
        return False, f"SLURM was not asked: {e}"
    said = asked.stderr if asked.returncode else ""
    if is_silence(said):
        return False, f"SLURM was not asked: {explain(said, text, inherited)}"
    if not said and any(one.startswith("--timeout") for one in too_much(text, inherited)):
        said = "the job could never start: PartitionTimeLimit"  # which the test does not look at
    if said:
        return True, f"SLURM would refuse this job: {explain(said, text, inherited)}"
    lines = [re.sub(r"^sbatch: ", "", line) for line in asked.stderr.splitlines() if " to start at " in line]
    return False, f"SLURM would accept this job: {lines[-1] if lines else asked.stderr.strip()}"


def state(job_id: str) -> str:
    """Return ``PENDING (Priority)`` or the like; "" if SLURM does not answer."""
    shown = ask(["squeue", "--noheader", "--jobs", job_id, "--format", "%T (%r)"], os.environ).strip()
    return shown.partition("\n")[0].replace(" (None)", "")
