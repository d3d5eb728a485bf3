"""The batch script of a SLURM job: one srun task a process, so that signals, ranks and deaths are SLURM's own.

The script is complete: ``sbatch SCRIPT`` submits the same job again. Its parts, in order: environment, check of the
interpreter on every node, srun, requeue if there is more to do. Not here: calling sbatch (``slurm.py``). Read
:func:`render` first.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

from dinov2_custom.run import environment_check
from dinov2_custom.run.args import RESOURCES
from dinov2_custom.run.environment import Environment
from dinov2_custom.world import TORCHRUN_VARIABLES

JOB = "%j"  # stands for the job's number in an output directory, as in upstream
_PLAIN = re.compile(r"[\w./+,=@:-]+")  # what neither bash nor sbatch's file name patterns read in another way


def render(
    args: argparse.Namespace,
    name: str,
    environment: Environment,
    spec: dict[str, Any],
    config: str | None,
    command: str,
) -> str:
    """Return the script.

    Args:
        args: resolved options and an absolute ``output_dir``, which may hold ``%j``.
        spec: what ``run/task.py`` runs.
        config: YAML text of the complete configuration, which the job writes into the run directory.
        command: the user's command line, for the reader.
    """
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{option}" for option in options(args, name)]
    lines += [*(f"# {line}" for line in f"submitted by: {command}".splitlines()), ""]
    lines += _start(args.output_dir, config)
    lines += _environment(environment)
    lines += _run(args, spec)
    return "\n".join(lines) + "\n"


def options(args: argparse.Namespace, name: str) -> list[str]:
    """Return sbatch's options without dashes; those of ``--slurm`` come last and win."""
    chosen = {
        "job-name": name,
        "nodes": str(args.nodes),
        "ntasks-per-node": str(args.ngpus),
        "cpus-per-task": str(args.cpus_per_task),
        "time": str(args.timeout),
        "signal": f"USR2@{min(args.signal_delay, args.timeout * 30)}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{args.output_dir}/%j_log.out" if _PLAIN.fullmatch(args.output_dir) else "/dev/null",
    }
    if not args.cpu and not args.gres:
        chosen["gpus-per-node"] = str(args.ngpus)
    features = [text for text in (args.constraint, "volta32gb" if args.use_volta32 else None) if text]
    for option in RESOURCES:
        if option.sbatch and getattr(args, option.dest):
            chosen[option.sbatch] = getattr(args, option.dest)
    if features:
        chosen["constraint"] = "&".join(features)
    if args.exclusive:
        chosen["exclusive"] = ""
    for text in args.slurm:
        key, _, value = text.partition("=")
        chosen[key] = value
    return [f"{key}={_quoted(value)}" if value else key for key, value in chosen.items()]


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[^\s\"'\\#]+", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _start(output_dir: str, config: str | None) -> list[str]:
    folder = '"$SLURM_JOB_ID"'.join(shlex.quote(part) if part else "" for part in output_dir.split(JOB))
    lines = [
        "set -eo pipefail",
        f"run_directory={folder}",
        'mkdir -p "$run_directory"',
        'job_files="$run_directory/$SLURM_JOB_ID"',
    ]
    if not _PLAIN.fullmatch(output_dir):
        lines.append('exec >>"${job_files}_log.out" 2>&1')
    lines += [
        'fail() { trap - EXIT; echo "error: job $SLURM_JOB_ID on ${SLURMD_NODENAME:-$(hostname)}: $1"; exit 1; }',
        f"unset {' '.join(TORCHRUN_VARIABLES)}  # of the shell that submitted",
        "trap : TERM USR1 USR2  # the processes get these too; this script waits for them",
        'echo "job $SLURM_JOB_ID attempt=${SLURM_RESTART_COUNT:-0} nodes=$SLURM_JOB_NODELIST $(date)"',
    ]
    if config is not None:
        end = "END_OF_CONFIGURATION"
        lines += [f'[ -e "${{job_files}}_config.yaml" ] || cat >"${{job_files}}_config.yaml" <<\'{end}\'']
        lines += [config.rstrip("\n"), end]
    return [*lines, ""]


def _environment(environment: Environment) -> list[str]:
    check = Path(environment_check.__file__).read_text(encoding="utf-8")
    expected = shlex.join([environment.prefix, environment.executable])
    lines = ["# the environment"]
    if environment.lines:
        lines.append("trap 'fail \"this step of the environment failed: $step\"' EXIT")
    for step, text in environment.lines:
        lines += [f"step={shlex.quote(step)}", text] if step else [text]
    if environment.lines:
        lines.append("trap - EXIT")
    return [
        *lines,
        f"python={environment.python}",
        "checked=0",
        '[ -n "$python" ] || fail "no Python was found; check --python, --modules and --setup"',
        "read -r -d '' check <<'END_OF_CHECK' || true",
        check.rstrip("\n"),
        "END_OF_CHECK",
        'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 '
        "--kill-on-bad-exit=1 bash -c '",
        '  [ -x "$1" ] || { echo "error: node $SLURMD_NODENAME: there is no interpreter $1"; exit 1; }',
        '  exec "$1" -c "$2" "$SLURMD_NODENAME" "$3" "$4"',
        f'\' check "$python" "$check" {expected} || checked=$?',
        '[ "$checked" = 0 ] || [ "$checked" -gt 128 ] || exit 1  # above 128: stopped by a signal',
        "",
    ]


def _run(args: argparse.Namespace, spec: dict[str, Any]) -> list[str]:
    return [
        "# the processes",
        f"spec={shlex.quote(json.dumps(spec))}",
        'marker=$(cat "$run_directory/last_checkpoint" 2>/dev/null || true)',
        'export DINOV2_OUTCOMES="${job_files}_outcomes"; rm -rf "$DINOV2_OUTCOMES"; mkdir "$DINOV2_OUTCOMES"',
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{args.cpus_per_task}}}",
        *(["export CUDA_VISIBLE_DEVICES=  # --cpu, also where SLURM does not hide GPUs"] if args.cpu else []),
        "code=$checked",
        f'[ "$checked" -gt 0 ] || srun --cpus-per-task={args.cpus_per_task} --kill-on-bad-exit=1 --wait=1800 '
        '"$python" -u -m dinov2_custom.run.task "$spec" || code=$?',
        '"$python" -m dinov2_custom.run.requeue "$run_directory" "$marker" "${checked#0}" || code=$?',
        "exit $code",
    ]
