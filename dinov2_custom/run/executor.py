"""The batch script of a SLURM job, as submitit makes it: resources, environment, what runs before and after.

Every process is one task of submitit's srun, so that signals, ranks and deaths are SLURM's own. In order: environment,
check of the interpreter on every node, the processes (``process.py``), requeue if there is more to do
(``requeue.py``). Torch-free. Read :func:`parameters` first.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from submitit.slurm import slurm as submitit_slurm

from dinov2_custom.errors import LaunchError
from dinov2_custom.run import environment_check
from dinov2_custom.run.args import RESOURCES, count_gpus
from dinov2_custom.run.environment import Environment
from dinov2_custom.run.requeue import AGAIN
from dinov2_custom.world import TORCHRUN_VARIABLES

JOB = "%j"  # stands for the job's number in an output directory, as in upstream
PYTHON = '"${python[@]}"'  # bash: the words that start the job's interpreter


def parameters(args: argparse.Namespace, name: str, environment: Environment, command: str) -> dict[str, Any]:
    """Return what submitit's SlurmExecutor takes.

    Args:
        args: resolved options and an absolute ``output_dir``, which may hold ``%j``.
        name: of the job, unless ``--job-name`` gives one.
        command: the user's command line, which the script's header has.

    Raises:
        LaunchError: a value that would not stay on its line of the script.
    """
    delay = min(args.signal_delay, args.timeout * 30)
    wanted: dict[str, Any] = {
        "job_name": name,
        "nodes": args.nodes,
        "ntasks_per_node": args.ngpus,
        "cpus_per_task": args.cpus_per_task,
        "gpus_per_node": None if args.cpu or count_gpus(args.gres or "") else args.ngpus,
        "time": args.timeout,
        "signal_delay_s": delay,
        "wckey": None,  # clusters that check them refuse submitit's own
        "setup": _setup(args, environment, command, delay),
        "srun_args": ["--kill-on-bad-exit=1", "--wait=1800", f"--cpus-per-task={args.cpus_per_task}", *args.srun_arg],
        "teardown": ['finish "$?"'],
        "additional_parameters": _options(args),
    }
    for option, value in {"output_dir": args.output_dir, **wanted, **wanted["additional_parameters"]}.items():
        if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f\\]", value):
            raise LaunchError(
                f"--{option.replace('_', '-')}: expected one line without backslashes, got {value!r}; take them out"
            )
    if "%" in args.output_dir.replace(JOB, ""):
        raise LaunchError(f"--output-dir: expected no % but in {JOB}, which SLURM replaces, got {args.output_dir}")
    return wanted


def script(parameters: dict[str, Any], output_dir: str, tasks: int = 1) -> str:
    """Return the batch script that submitit submits; ``tasks``: of a job array."""
    command = f"{PYTHON} -u -m submitit.core._submit {shlex.quote(output_dir)}"
    array = {"map_count": tasks} if tasks > 1 else {}
    return submitit_slurm._make_sbatch_string(command=command, folder=output_dir, **parameters, **array) + "\n"


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the other options of sbatch; those of ``--slurm`` come last and win."""
    # what the script prints does not go where rank 0 prints; a folder named by the job is not there when it starts
    log = "/dev/null" if JOB in args.output_dir else f"{args.output_dir}/{'%A_%a' if args.sweep else JOB}_log.out"
    chosen: dict[str, Any] = {"requeue": True, "output": log, "error": log}
    given = {option.sbatch: getattr(args, option.dest) for option in RESOURCES if option.sbatch}
    chosen |= {name.replace("-", "_"): value for name, value in given.items() if value}
    features = [text for text in (args.constraint, "volta32gb" if args.use_volta32 else None) if text]
    if features:
        chosen["constraint"] = "&".join(features)
    if args.exclusive:
        chosen["exclusive"] = True
    for text in args.slurm:
        key, _, value = text.partition("=")
        chosen[key.replace("-", "_")] = value or True
    if "no_requeue" in chosen:  # sbatch takes the last of the two, in the order of the alphabet
        del chosen["requeue"]
    return chosen


def _setup(args: argparse.Namespace, environment: Environment, command: str, delay: int) -> list[str]:
    base = '"$SLURM_JOB_ID"'.join(shlex.quote(part) if part else "" for part in args.output_dir.split(JOB))
    again = shlex.quote(f"this script alone starts nothing, give the command again: {command}")
    return [
        *(f"# {line}" for line in f"submitted by: {command}".splitlines()),
        "set -eo pipefail",
        f"base={base}",
        "folder=$base" + ("/$SLURM_ARRAY_TASK_ID" if args.sweep else ""),
        # SLURM_JOB_ID of one task of an array is that of the array, and stands for all its tasks
        "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
        'job_files=$base/$job submission="$base/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_submission.sh"',
        'mkdir -p "$folder"',
        *(['exec >>"${job_files}_log.out" 2>&1'] if JOB in args.output_dir else []),
        'fail() { trap - EXIT; echo "error: job $job on ${SLURMD_NODENAME:-$(hostname)}: $1"; exit 1; }',
        "finish() {  # with what the processes ended with: requeue the job, or end it",
        f'  local code=0; {PYTHON} -m dinov2_custom.run.requeue "$folder" "$job_files" "$marker" "$checked" "$1" '
        '"$(scontrol show job "$job")" || code=$?',
        f'  [ "$code" = {AGAIN} ] || exit "$code"',
        "  # SLURM ends this script, which must not end first: the job would count as finished",
        '  scontrol requeue "$job" && { sleep 60 || exit 1; }  # ended by SLURM: it is requeued',
        '  fail "it could not be requeued; submit it again, it goes on from its checkpoint"',
        "}",
        f'[[ "$(scontrol show job "$job")" != *Command=*_submission.sh* ]] || fail {again}',
        f"unset {' '.join(TORCHRUN_VARIABLES)} ${{!OMPI_@}} ${{!PMI_@}} ${{!PMIX_@}} ${{!TORCHELASTIC_@}}",
        "export SLURM_EXPORT_ENV=ALL  # to the processes, also with --export=NONE",
        "trap : TERM USR1 USR2  # the processes get these too; this script waits for them",
        'echo "job $job attempt=${SLURM_RESTART_COUNT:-0} nodes=$SLURM_JOB_NODELIST $(date)"',
        *_environment(environment),
        "",
        "# the processes",
        'marker=$(cat "$folder/last_checkpoint" 2>/dev/null || true)',
        "# --no-resume is for the first attempt",
        '[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || [ ! "$folder/last_checkpoint" -nt "$submission" ] || '
        "export DINOV2_RESUME=1",
        'rm -f "$job_files"_*_result.pkl*',
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{args.cpus_per_task}}} DINOV2_SIGNAL_DELAY={delay}",
        *(["export CUDA_VISIBLE_DEVICES=  # --cpu, also where SLURM does not hide GPUs"] if args.cpu else []),
        "set +e",
        '[ "$checked" = 0 ] || finish "$checked"',
    ]


def _environment(environment: Environment) -> list[str]:
    check = Path(environment_check.__file__).read_text(encoding="utf-8")
    expected = shlex.join([environment.prefix, environment.executable])
    lines = ["", "# the environment"]
    if environment.lines:
        lines.append("trap 'fail \"this step of the environment failed: $step\"' EXIT")
    for step, text in environment.lines:
        lines += [f"step={shlex.quote(step)}", text] if step else [text]
    if environment.lines:
        lines.append("trap - EXIT")
    return [
        *lines,
        f"python=({environment.python})",
        "checked=0",
        '[ -n "${python[0]}" ] || fail "no Python was found; check --python, --modules and --setup"',
        "read -r -d '' check <<'END_OF_CHECK' || true",
        check.rstrip("\n"),
        "END_OF_CHECK",
        'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 '
        "--kill-on-bad-exit=1 bash -c '",
        "  check=$1 prefix=$2 executable=$3; shift 3",
        '  command -v "$1" >/dev/null || { echo "error: node $SLURMD_NODENAME: there is no interpreter $1"; exit 1; }',
        '  exec "$@" -c "$check" "$SLURMD_NODENAME" "$prefix" "$executable"',
        f'\' check "$check" {expected} {PYTHON} || checked=$?',
        '[ "$checked" = 0 ] || [ "$checked" -gt 128 ] || exit 1  # above 128: stopped by a signal',
    ]
