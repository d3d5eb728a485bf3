"""Submit a batch script, and say in one sentence why SLURM refused it.

Not the script (``sbatch.py``), not the sentence (``refusal.py``). Torch-free. Read :func:`submit` first.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from dinov2_custom.configs.output_dir import missing_folders, remove_empty
from dinov2_custom.errors import LaunchError
from dinov2_custom.run.refusal import QUERY_TIMEOUT_S, ask, explain
from dinov2_custom.run.sbatch import JOB

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


def submit(script: str, output_dir: str, environment: Mapping[str, str]) -> tuple[str, Path, str]:
    """Submit ``script``, write it into the run directory, and return (job number, run directory, state in words).

    Args:
        output_dir: absolute; ``%j`` becomes the job's number.
        environment: what the job inherits, but for the variables of a job this process may be in.

    Raises:
        LaunchError: SLURM refuses the job or will never start it; nothing is left behind then.
    """
    inherited = _inherited(environment, script)
    made = [] if JOB in output_dir else _make(Path(output_dir))
    try:
        asked = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, env=inherited)
        if asked.returncode:
            raise LaunchError(explain(asked.stderr, script, inherited))
        job_id = asked.stdout.strip().splitlines()[-1].split(";")[0]
        shown = state(job_id)
        if any(reason in shown for reason in _HOPELESS):
            subprocess.run(["scancel", job_id], check=False)
            raise LaunchError(explain(f"the job could never start: {shown}", script, inherited))
    except BaseException:
        remove_empty(made)
        raise
    run_directory = Path(output_dir.replace(JOB, job_id))
    run_directory.mkdir(parents=True, exist_ok=True)
    path = run_directory / f"{job_id}_submission.sh"
    with open(path, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o777)) as file:
        file.write(script)
    return job_id, run_directory, shown


def others_in(output_dir: Path) -> list[str]:
    """Return the jobs of this user, waiting or running, that were submitted to write into ``output_dir``."""
    known = {path.name.removesuffix("_submission.sh") for path in output_dir.glob("*_submission.sh")}
    if not known:
        return []
    listed = ask(["squeue", "--me", "--noheader", "--format", "%i %T"], os.environ).splitlines()
    return [line for line in listed if line.partition(" ")[0] in known]


def _inherited(environment: Mapping[str, str], script: str) -> dict[str, str]:
    """Leave out the variables of a job this process may be in, and those that would win over the script's options."""
    special = {"TIME": "TIMELIMIT", "MEM": "MEM_PER_NODE"}
    options = [name.upper().replace("-", "_") for name in re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)]
    stronger = {f"SBATCH_{special.get(name, name)}" for name in options}
    return {
        name: value
        for name, value in environment.items()
        if name not in stronger and (not name.startswith("SLURM_") or name == "SLURM_CONF")
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


def check_syntax(script: str) -> None:
    """Let bash read the script without running it.

    Raises:
        LaunchError: a ``--setup`` line that is no bash.
    """
    read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if read.returncode:
        reason = read.stderr.strip().splitlines()[0]
        raise LaunchError(
            f"--setup: expected lines of bash, got: {reason}; each --setup is one line, quoted for your shell"
        )


def foretell(script: str, environment: Mapping[str, str]) -> str:
    """Return in a sentence what SLURM would do with ``script``: when it could start, or why it would be refused."""
    inherited = _inherited(environment, script)
    command = ["sbatch", "--test-only"]
    try:
        asked = subprocess.run(
            command, input=script, capture_output=True, text=True, env=inherited, timeout=QUERY_TIMEOUT_S
        )
    except FileNotFoundError:
        return "SLURM was not asked: no sbatch on PATH"
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"SLURM was not asked: {e}"
    if asked.returncode:
        return f"SLURM would refuse this job: {explain(asked.stderr, script, inherited)}"
    lines = [re.sub(r"^sbatch: ", "", line) for line in asked.stderr.splitlines() if " to start at " in line]
    return f"SLURM would accept this job: {lines[-1] if lines else asked.stderr.strip()}"


def state(job_id: str) -> str:
    """Return ``PENDING (Priority)`` or the like; "" if SLURM does not answer."""
    return (
        ask(["squeue", "--noheader", "--jobs", job_id, "--format", "%T (%r)"], os.environ)
        .strip()
        .replace(" (None)", "")
    )


def _make(folder: Path) -> list[Path]:
    """Make ``folder`` and return the folders that were not there, innermost first."""
    missing = missing_folders(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return missing
