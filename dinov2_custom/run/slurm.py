"""Create, check and submit a SLURM job through submitit.

Every process is one task of submitit's srun, so that SLURM handles signals, ranks and failures. Before the tasks, the
script sets up the environment and checks the interpreter on every node; afterwards it requeues the job if the run is
not complete (``requeue.py``). Does not import torch.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils as submitit_utils
from submitit.slurm import slurm as submitit_slurm

from dinov2_custom.configs.paths import missing_folders, remove_empty
from dinov2_custom.errors import LaunchError
from dinov2_custom.run import environment_check, refusal
from dinov2_custom.run.args import RESERVED, RESOURCES, count_gpus
from dinov2_custom.run.environment import Environment
from dinov2_custom.run.process import Process
from dinov2_custom.run.requeue import AGAIN
from dinov2_custom.world import TORCHRUN_VARIABLES

JOB = "%j"  # placeholder for the job's number in an output directory, as in upstream
PYTHON = '"${python[@]}"'  # bash: the words that start the job's interpreter
# bash before the processes; words between @ are substituted
_SETUP = r"""@header@
set -eo pipefail
base=@base@
folder=$base@run@
# SLURM_JOB_ID of one task of an array is that of the array, and stands for all its tasks
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
job_files=$base/$job submission="$base/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_submission.sh"
mkdir -p "$folder"
@log@
fail() { trap - EXIT; echo "error: job $job on ${SLURMD_NODENAME:-$(hostname)}: $1"; exit 1; }
finish() {  # with what the processes ended with: requeue the job, or end it
  local code=0
  @python@ -m dinov2_custom.run.requeue "$folder" "$job_files" "$marker" "$checked" "$1" \
    "$(scontrol show job "$job")" || code=$?
  [ "$code" = @again@ ] || exit "$code"
  # SLURM ends this script, which must not end first: the job would count as finished
  scontrol requeue "$job" && { sleep 60 || exit 1; }  # ended by SLURM: it is requeued
  fail "it could not be requeued; submit it again to resume from its checkpoint"
}
[[ "$(scontrol show job "$job")" != *Command=*_submission.sh* ]] || fail @by_hand@
unset @torchrun@ ${!OMPI_@} ${!PMI_@} ${!PMIX_@} ${!TORCHELASTIC_@}
export SLURM_EXPORT_ENV=ALL  # to the processes, also with --export=NONE
trap : TERM USR1 USR2  # the processes get these too; this script waits for them
echo "job $job attempt=${SLURM_RESTART_COUNT:-0} nodes=$SLURM_JOB_NODELIST $(date)"

# the environment
trap 'fail "this step of the environment failed: $step"' EXIT
@steps@
trap - EXIT
python=(@interpreter@)
[ -n "${python[0]}" ] || fail "no Python was found; check --python, --modules and --setup"
read -r -d '' check <<'END_OF_CHECK' || true
@check@
END_OF_CHECK
checked=0
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 \
  --kill-on-bad-exit=1 bash -c '
  check=$1 prefix=$2 executable=$3; shift 3
  command -v "$1" >/dev/null || { echo "error: node $SLURMD_NODENAME: there is no interpreter $1"; exit 1; }
  exec "$@" -c "$check" "$SLURMD_NODENAME" "$prefix" "$executable"
' check "$check" @expected@ @python@ || checked=$?
[ "$checked" = 0 ] || [ "$checked" -gt 128 ] || exit 1  # above 128: stopped by a signal

# the processes
marker=$(cat "$folder/last_checkpoint" 2>/dev/null || true)
# --no-resume is for the first attempt
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [ ! "$folder/last_checkpoint" -nt "$submission" ] || export DINOV2_RESUME=1
rm -f "$job_files"_*_result.pkl*
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-@cpus@} DINOV2_SIGNAL_DELAY=@delay@
@hidden@
set +e
[ "$checked" = 0 ] || finish "$checked"
"""
# pending reasons that do not resolve by waiting
_NEVER_STARTS = ("PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "InvalidAccount", "InvalidQOS")
_NEVER_STARTS += ("BadConstraints", "WallDurationPerJobLimit", "can't use this partition")
_NEVER_STARTS += ("not permitted to use this partition",)
# files that submitit leaves behind after a failed submission
_LEFT = re.compile(r"[0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh")


def parameters(args: argparse.Namespace, name: str, environment: Environment, command: str) -> dict[str, Any]:
    """Return the parameters of submitit's SlurmExecutor.

    Args:
        args: resolved options and an absolute ``output_dir``, which may contain ``%j``.
        name: name of the job, unless ``--job-name`` is given.
        command: the user's command line, recorded in the script's header.

    Raises:
        LaunchError: if a value would not fit on one line of the script.
    """
    delay = min(args.signal_delay, args.timeout * 30)
    # the script's output is kept apart from rank 0's; a folder named by the job number does not exist when it starts
    log = "/dev/null" if JOB in args.output_dir else f"{args.output_dir}/{'%A_%a' if args.sweep else JOB}_log.out"
    options: dict[str, Any] = {"job_name": name, "ntasks_per_node": args.ngpus, "time": args.timeout}
    options |= {"requeue": True, "output": log, "error": log}
    if not args.cpu and not count_gpus(args.gres):
        options["gpus_per_node"] = args.ngpus
    options |= {option.dest: value for option in RESOURCES if option.sbatch and (value := getattr(args, option.dest))}
    if args.use_volta32:
        options["constraint"] = "&".join(filter(None, (args.constraint, "volta32gb")))
    for text in args.slurm:  # takes precedence
        key, _, value = text.partition("=")
        options[key.replace("-", "_")] = value or True
    if "no_requeue" in options:  # options are sorted alphabetically, and sbatch uses the last of the two
        del options["requeue"]
    for option, value in {"output_dir": args.output_dir, **options}.items():
        if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f\\]", value):
            raise LaunchError(
                f"--{option.replace('_', '-')}: expected one line without backslashes, got {value!r}; remove them"
            )
    if "%" in args.output_dir.replace(JOB, ""):
        raise LaunchError(f"--output-dir: expected no % but in {JOB}, which SLURM replaces, got {args.output_dir}")
    return {
        "signal_delay_s": delay,
        "wckey": None,  # clusters that check it reject submitit's default
        "setup": [_setup(args, environment, command, delay)],
        "srun_args": ["--kill-on-bad-exit=1", "--wait=1800", f"--cpus-per-task={args.cpus_per_task}", *args.srun_arg],
        "teardown": ['finish "$?"'],
        "additional_parameters": options,
    }


def _setup(args: argparse.Namespace, environment: Environment, command: str, delay: int) -> str:
    steps = [(f"step={shlex.quote(step)}\n" if step else "") + line for step, line in environment.lines]
    words = {
        "header": "\n".join(f"# {line}" for line in f"submitted by: {command}".splitlines()),
        "base": '"$SLURM_JOB_ID"'.join(shlex.quote(part) if part else "" for part in args.output_dir.split(JOB)),
        "run": "/$SLURM_ARRAY_TASK_ID" if args.sweep else "",
        "log": 'exec >>"${job_files}_log.out" 2>&1' if JOB in args.output_dir else "",
        "by_hand": shlex.quote(f"this script alone starts nothing, give the command again: {command}"),
        "torchrun": " ".join(TORCHRUN_VARIABLES),
        "steps": "\n".join(steps),
        "interpreter": environment.python,
        "check": Path(environment_check.__file__).read_text(encoding="utf-8").rstrip("\n"),
        "expected": shlex.join([environment.prefix, environment.executable]),
        "hidden": "export CUDA_VISIBLE_DEVICES=  # --cpu, also where SLURM does not hide GPUs" if args.cpu else "",
    }
    words |= {"python": PYTHON, "again": str(AGAIN), "cpus": str(args.cpus_per_task), "delay": str(delay)}
    return re.sub(r"@(\w+)@", lambda match: words[match[1]], _SETUP)


def script(parameters: dict[str, Any], output_dir: str, tasks: int = 1) -> str:
    """Return the batch script that submitit submits; ``tasks`` is the size of a job array."""
    command = f"{PYTHON} -u -m submitit.core._submit {shlex.quote(output_dir)}"
    array = {"map_count": tasks} if tasks > 1 else {}
    return submitit_slurm._make_sbatch_string(command=command, folder=output_dir, **parameters, **array) + "\n"


def check_installed() -> None:
    """Check that SLURM's commands are available.

    Raises:
        LaunchError: if they are not.
    """
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        raise LaunchError(
            f"expected SLURM's commands on PATH, got no {', '.join(missing)}; log in to a cluster, load its module, or "
            "use --launcher local"
        )


def check_syntax(script: str) -> None:
    """Check the syntax of ``script`` with bash, without running it.

    Raises:
        LaunchError: if a ``--setup`` line is not valid bash.
    """
    read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if read.returncode:
        reason = read.stderr.strip().splitlines()[0]
        raise LaunchError(
            f"--setup: expected lines of bash, got: {reason}; each --setup is one line, quoted for your shell"
        )


def test_only(script: str) -> tuple[bool, str]:
    """Return whether SLURM would run ``script`` (true if unknown), and a sentence with the time or the reason."""
    with environment_of_sbatch(script):
        code, _, words = refusal.call("sbatch", "--test-only", input=script)
    if code is None:
        return True, f"SLURM was not asked: {words}"
    if code and refusal.is_unreachable(words):
        return True, f"SLURM was not asked: {refusal.explain(words, script)}"
    if code:
        return False, f"SLURM would refuse this job: {refusal.explain(words, script)}"
    if closed := refusal.closed_partition(script):
        return False, f"SLURM would not run this job: {refusal.explain(closed, script)}"
    lines = [re.sub(r"^sbatch: ", "", line) for line in words.splitlines() if " to start at " in line]
    return True, f"SLURM would accept this job: {lines[-1] if lines else words.strip()}"


def submit(parameters: dict[str, Any], output_dir: str, processes: Sequence[Process]) -> tuple[str, Path, str]:
    """Submit ``processes``, several as a job array; return (job number, folder of its files, state in words).

    Args:
        parameters: parameters of submitit's SlurmExecutor.
        output_dir: absolute path; ``%j`` is replaced by the job's number.

    Raises:
        LaunchError: if SLURM refuses the job or will never start it; no files are left behind.
    """
    text = script(parameters, output_dir, len(processes))
    folder = submitit_utils.JobPaths.get_first_id_independent_folder(output_dir)
    made, before = missing_folders(folder), set(folder.glob("*"))
    executor = submitit.SlurmExecutor(output_dir, python=PYTHON)
    executor.update_parameters(**parameters)
    job_id = ""
    try:
        # submitit prints sbatch's error message in addition to raising it
        with environment_of_sbatch(text), redirect_stderr(io.StringIO()):
            job_id = executor.submit_array(processes)[0].job_id.partition("_")[0]
        shown = refusal.ask("squeue", "--noheader", "--jobs", job_id, "--format", "%T (%r)").strip()
        state = shown.partition("\n")[0].replace(" (None)", "")
        if any(reason in state for reason in _NEVER_STARTS):
            raise submitit_utils.FailedJobError(f"the job could never start: {state}")
    except (submitit_utils.FailedJobError, submitit_utils.FailedSubmissionError) as e:
        left = [path for path in set(folder.glob("*")) - before if _LEFT.fullmatch(path.name)]
        if job_id:
            subprocess.run(["scancel", job_id], check=False)
            left += Path(output_dir.replace(JOB, job_id)).glob(f"{job_id}_*")
        for path in left:
            path.unlink()
        remove_empty([Path(output_dir.replace(JOB, job_id)), *made])
        raise LaunchError(refusal.explain(str(e), text)) from e
    for path in set(folder.glob(".submission_file_*")) - before:
        path.unlink()  # submitit's link to the script
    files = Path(output_dir.replace(JOB, job_id))
    for path in files.glob(f"{job_id}_*submitted.pkl"):
        path.chmod(0o600)  # the job unpickles and calls its content
    return job_id, files, state


@contextmanager
def environment_of_sbatch(script: str) -> Iterator[None]:
    """Hide the variables of an enclosing job, and sbatch's variables that would override ``script``."""
    special = {"TIME": "TIMELIMIT", "MEM": "MEM_PER_NODE", "ARRAY": "ARRAY_INX"}
    chosen = [*re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE), *RESERVED, "requeue", "no-requeue"]
    names = [option.upper().replace("-", "_") for option in chosen]
    hidden = {f"SBATCH_{special.get(name, name)}" for name in names}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or (name.startswith("SBATCH_") and name not in hidden)
    }
    with submitit.helpers.clean_env(), submitit_utils.environment_variables(**kept):
        yield
