"""Launch a task: as a SLURM job, on this machine, or in this process. Upstream's names.

Submitting imports no torch; the configuration is checked before anything is started. Not here: the batch script
(``sbatch.py``), local processes (``local.py``), what a process does (``task.py``). Read :func:`submit_jobs` first.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dinov2_custom import entry
from dinov2_custom.configs.absolute_paths import absent
from dinov2_custom.configs.output_dir import check_output_dir, resolve_output_dir
from dinov2_custom.errors import LaunchError
from dinov2_custom.exit_codes import is_worth_a_restart
from dinov2_custom.extras import optional
from dinov2_custom.run import cluster_file, environment, local, sbatch, slurm, task
from dinov2_custom.run.args import CLUSTER_OPTIONS, SLURM_DESTS, get_args_parser
from dinov2_custom.run.gpus import check_gpus
from dinov2_custom.utils.cluster import get_user_checkpoint_path
from dinov2_custom.world import World, world_from_environment

__all__ = ["Task", "get_args_parser", "get_shared_folder", "submit_jobs"]


class Task:
    """What every process of a run does: ``main(args)`` of a module that is imported on the node only.

    Subclasses name the module. An object can be given to submitit's executors as it is.
    """

    module = ""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def prepare(self, warn: Callable[[str], None]) -> str | None:
        """Check ``args`` before anything is started; return the complete configuration as YAML, if there is one.

        ``args.output_dir`` is set where the configuration has it; ``warn`` is called with each warning.

        Raises:
            DINOv2Error: what would end the run.
        """
        return None

    def __call__(self) -> int:
        """Run in this process, whose rank is in its environment, and return the exit code.

        Raises:
            LaunchError: GPUs were given that torch does not see.
        """
        os.environ.setdefault(
            "OMP_WAIT_POLICY", "PASSIVE"
        )  # spinning threads slow data loading on a CPU; read by torch
        check_gpus(os.environ)
        code = int(entry.import_quietly(self.module).main(self.args) or 0)
        if is_worth_a_restart(code) and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            _requeue_for_submitit(code)
        return code

    def checkpoint(self) -> Any:
        """Return what submitit submits again; it goes on from the checkpoint on disk.

        Raises:
            LaunchError: submitit is not installed.
        """
        helpers = optional("submitit.helpers", "checkpoint()", LaunchError)
        return helpers.DelayedSubmission(type(self)(self.args))


def get_shared_folder() -> Path:
    """Return where this user's runs go, seen by all nodes: DINOV2_CHECKPOINT_PATH/<user>/experiments, or ./outputs."""
    folder = get_user_checkpoint_path()
    return folder / "experiments" if folder else Path("outputs").absolute()


def submit_jobs(task_class: type, args: argparse.Namespace, name: str) -> int:
    """Launch ``task_class(args)`` as ``args`` say and return the exit code; 0 once a SLURM job is submitted.

    Args:
        task_class: :class:`Task` or any class at the top of a module that takes ``args`` and can be called.
        args: what :func:`get_args_parser` parses, with ``output_dir``.
        name: of the SLURM job.

    Raises:
        DINOv2Error: flags, configuration, environment or cluster that cannot work; nothing is left behind.
    """
    for dest in (*CLUSTER_OPTIONS, "launcher", "cluster", "dry_run", "output_dir"):
        setattr(args, dest, getattr(args, dest, None))
    launcher = choose_launcher(args, os.environ)
    if launcher != "slurm":
        args.output_dir = (args.output_dir or "").replace(sbatch.JOB, os.environ.get("SLURM_JOB_ID", "local"))
    if launcher != "slurm" and args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # of this process and those it starts; torch looks when it is first asked
        )
    if launcher == "inline" and (unused := unused_counts(args, world_from_environment(os.environ))):
        print(f"warning: {unused}", file=sys.stderr)
    if launcher == "slurm":
        return _submit(task_class, args, name)
    # mistakes in the arguments come before what this machine lacks; ranks that are there choose the directory together
    checked = argparse.Namespace(**vars(args)) if launcher == "inline" else args
    config = _prepare(task_class, checked, warn=lambda text: None)  # the processes will say it
    processes = 1 if launcher == "inline" else local.num_processes(args)
    if args.dry_run:
        print(f"# {launcher}, {processes} processes: {_command()}\n{config or ''}", end="")
        return 0
    if processes == 1:
        return int(task_class(args)() or 0)
    return local.launch(task_class, args, processes)


def choose_launcher(args: argparse.Namespace, environment: Mapping[str, str]) -> str:
    """Return slurm, local or inline; see ``--launcher``.

    Raises:
        LaunchError: flags of SLURM for a launcher that has no use for them.
    """
    given = [f"--{dest.replace('_', '-')}" for dest in SLURM_DESTS if getattr(args, dest, None)]
    inside = "TORCHELASTIC_RUN_ID" in environment or world_from_environment(environment).size > 1
    chosen = args.launcher or ("inline" if inside else "slurm" if given else "local")
    if chosen == "slurm" and inside:
        raise LaunchError(
            "--launcher slurm: expected a single process, got one of several (torchrun, srun); use inline"
        )
    if given == ["--nodes"] and (chosen == "inline" or args.nodes == 1):  # see unused_counts
        return chosen
    if given and chosen != "slurm":
        raise LaunchError(f"{', '.join(given)}: expected --launcher slurm, got {chosen}; leave these flags out")
    return chosen


def unused_counts(args: argparse.Namespace, world: World) -> str:
    """Say that ``--ngpus`` or ``--nodes`` contradict the processes that are there already; "" where they do not.

    Rank 0 says it for all.
    """
    nodes = -(-world.size // world.local_size)
    given = [("--ngpus", args.ngpus, world.local_size), ("--nodes", args.nodes, nodes)]
    wrong = [f"{flag} {value}" for flag, value, there in given if value and value != there]
    if not wrong or world.rank:
        return ""
    return (
        f"{', '.join(wrong)}: not used, since {world.source} started {world.local_size} processes on each of {nodes} "
        "nodes; leave it out"
    )


def _prepare(task_class: type, args: argparse.Namespace, warn: Callable[[str], None]) -> str | None:
    """Check the arguments; set the absolute output directory, which all processes have to share."""
    made = task_class(args)
    config = made.prepare(warn) if isinstance(made, Task) else None
    args.output_dir = resolve_output_dir(args.output_dir, None)
    return config


def warn_of_absent(name: str, value: Any, warn: Callable[[str], None]) -> None:
    """Warn of paths in ``value``, what the key or flag ``name`` was given, that are not on this machine.

    It may not see the disks of the nodes, hence no error.
    """
    for path in absent(value):
        warn(f"{name}: nothing is at {path} on this machine; the job ends with an error unless its nodes see it")


def _submit(task_class: type, args: argparse.Namespace, name: str) -> int:
    cluster_file.fill_in(args)
    warnings: list[str] = []
    config = _prepare(task_class, args, warnings.append)
    if sbatch.JOB not in args.output_dir:
        check_output_dir(args.output_dir)
    env = environment.resolve(args, os.environ)
    if env.missing and issubclass(task_class, Task):
        raise LaunchError(
            f"--venv, --conda-env, --python: expected an environment with {', '.join(env.missing)}, found none for "
            f"{env.python}; install them with `{env.python} -m pip install -e {Path(__file__).resolve().parents[2]}`"
        )
    task_args = argparse.Namespace(**vars(args))
    if issubclass(task_class, Task):  # another class may read the launcher's options
        for dest in (*CLUSTER_OPTIONS, "launcher", "cluster", "dry_run"):
            delattr(task_args, dest)
    if config is not None:  # the job runs what was checked here, whatever happens to the file while it waits
        task_args.config_file, task_args.opts = f"{args.output_dir}/%j_config.yaml", []
    spec = task.make_spec(task_class, task_args, f"{args.output_dir}/%j", first_output=0)
    script = sbatch.render(args, name, env, spec, config, _command())
    slurm.check_syntax(script)
    if not args.dry_run:  # last: what a user can mend comes before what this machine lacks
        slurm.check_installed()
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    if args.dry_run:
        print(script, end="", flush=True)
        print(f"# {slurm.foretell(script, os.environ)}", file=sys.stderr)
        return 0
    after_another = any(text.startswith("dependency=") for text in args.slurm)
    if sbatch.JOB not in args.output_dir and not after_another and (others := slurm.others_in(Path(args.output_dir))):
        print(
            f"warning: --output-dir: there is already a job for {args.output_dir}: {', '.join(others)}; one that "
            "starts while another runs ends with an error. To run after it: --slurm dependency=afterany:"
            f"{others[-1].partition(' ')[0]}",
            file=sys.stderr,
        )
    job_id, run_directory, state = slurm.submit(script, args.output_dir, os.environ)
    logs = (run_directory / f"{job_id}_log.out", run_directory / "logs" / "log.txt")
    print(
        f"job {job_id} {state}\nfiles: {run_directory}\n"
        f"follow: tail -F {shlex.join(map(str, logs))}\nstop: scancel {job_id}"
    )
    return 0


def _command() -> str:
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join([sys.executable, *sys.argv])}"


def _requeue_for_submitit(code: int) -> None:
    """Do what submitit's own signal handler does, after the save instead of in the middle of a step."""
    if world_from_environment(os.environ).rank == 0:
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
    raise SystemExit(code)  # without a result: the job is not over
