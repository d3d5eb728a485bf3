"""Launch a task: as a SLURM job, on this machine, or in this process. Upstream's names.

Submitting imports no torch; the configuration is checked before anything is started. Not here: the batch script
(``executor.py``), local processes (``local.py``), what a process does (``process.py``). Read :func:`submit_jobs` first.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import submitit

from dinov2_custom import entry, errors
from dinov2_custom.configs.absolute_paths import absent
from dinov2_custom.configs.output_dir import check_output_dir, resolve_output_dir
from dinov2_custom.errors import LaunchError, should_restart
from dinov2_custom.run import cluster_file, environment, executor, local, slurm
from dinov2_custom.run.args import CLUSTER_OPTIONS, SLURM_DESTS, get_args_parser
from dinov2_custom.run.gpus import check_gpus
from dinov2_custom.run.process import Process
from dinov2_custom.run.refusal import cpus_per_task
from dinov2_custom.run.requeue import describe_job
from dinov2_custom.utils.cluster import get_user_checkpoint_path
from dinov2_custom.world import TORCHRUN_VARIABLES, World, world_from_environment

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
        # spinning threads slow data loading on a CPU; torch reads this when it is imported
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        check_gpus(os.environ)
        code = int(entry.import_quietly(self.module).main(self.args) or 0)
        if should_restart(code) and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            _requeue_for_submitit(code)
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return what submitit submits again; it goes on from the checkpoint on disk."""
        return submitit.helpers.DelayedSubmission(type(self)(self.args))


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
        args.output_dir = (args.output_dir or "").replace(executor.JOB, os.environ.get("SLURM_JOB_ID", "local"))
        # of a job around this command, such as a notebook that submitit started: not ours to requeue
        os.environ.pop("SUBMITIT_EXECUTOR", None)
    if launcher == "local":
        for variable in TORCHRUN_VARIABLES:  # left in the shell by something else
            os.environ.pop(variable, None)
    if launcher != "slurm" and args.cpu:
        # of this process and those it starts; torch looks when it is first asked
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if launcher == "inline" and (unused := unused_counts(args, world_from_environment(os.environ))):
        print(f"warning: {unused}", file=sys.stderr)
    if launcher == "slurm":
        return _submit(task_class, args, name)
    # mistakes in the arguments come before what this machine lacks; ranks that are there choose the directory together
    checked = argparse.Namespace(**vars(args)) if launcher == "inline" else args
    if launcher == "inline":
        checked.ngpus, checked.nodes = world_from_environment(os.environ).size, 1  # what optim.global_batch divides by
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
    inside = args.launcher != "local" and _is_one_of_several(environment, strict=not args.launcher and not given)
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


def _is_one_of_several(environment: Mapping[str, str], strict: bool) -> bool:
    """Return whether torchrun or srun started this process; half of their variables raise only if ``strict``."""
    try:
        return "TORCHELASTIC_RUN_ID" in environment or world_from_environment(environment).size > 1
    except LaunchError:
        if strict:
            raise
        return False


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
    cluster_file.resolve(args)
    warnings: list[str] = []
    runs = [_run(args, overrides) for overrides in product(*args.sweep)]
    configs = [_prepare(task_class, run, warnings.append) for run in runs]
    args.output_dir = resolve_output_dir(args.output_dir or runs[0].output_dir, None)
    for number, run in enumerate(runs):
        run.output_dir = f"{args.output_dir}/{number}" if args.sweep else args.output_dir
    if args.sweep and executor.JOB in args.output_dir:
        raise LaunchError(f"--output-dir: expected no {executor.JOB} with --sweep, got {args.output_dir}; leave it out")
    if executor.JOB not in args.output_dir:
        check_output_dir(args.output_dir)
    env = environment.resolve(args, os.environ)
    missing = [name for name in env.missing if name == "submitit" or issubclass(task_class, Task)]
    if missing:
        raise LaunchError(
            f"--venv, --conda-env, --python: expected an environment with {', '.join(missing)}, found none for "
            f"{env.python}; install them with `{env.python} -m pip install -e {Path(__file__).resolve().parents[2]}`"
        )
    if args.cpus_per_task is None:
        args.cpus_per_task = cpus_per_task(args.ngpus, args.partition, os.environ)
    parameters = executor.parameters(args, name, env, _command())
    script = executor.script(parameters, args.output_dir, len(runs))
    slurm.check_syntax(script)
    if not args.dry_run:  # last: mistakes that a user can fix come before what this machine lacks
        slurm.check_installed()
    for text in dict.fromkeys(warnings):
        print(f"warning: {text}", file=sys.stderr)
    if args.dry_run:
        refused, said = slurm.foretell(script, os.environ)
        print(script, *(f"# configuration\n{config}" for config in configs if config), sep="\n", end="", flush=True)
        print(f"# {said}", file=sys.stderr)
        return errors.ERROR if refused else errors.DONE
    _warn_of_others(args)
    for run in runs if issubclass(task_class, Task) else ():  # another class may read the launcher's options
        for dest in (*CLUSTER_OPTIONS, "launcher", "cluster", "dry_run"):
            delattr(run, dest)
    processes = [Process(task_class, run, config) for run, config in zip(runs, configs, strict=True)]
    job_id, folder, state = slurm.submit(parameters, args.output_dir, processes)
    number = "_0" if args.sweep else ""
    first = Path(runs[0].output_dir.replace(executor.JOB, job_id))
    logs = (folder / f"{job_id}{number}_log.out", first / "logs" / "log.txt")
    print(f"job {job_id} {state}\nfiles: {folder}")
    if args.sweep:
        print(*(f"{run.output_dir}: {' '.join(run.opts[-len(args.sweep) :])}" for run in runs), sep="\n")
    print(f"follow: tail -F {shlex.join(map(str, logs))}\nstop: scancel {job_id}")
    return errors.DONE


def _run(args: argparse.Namespace, overrides: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of one run of a sweep; of the only one without."""
    run = argparse.Namespace(**vars(args))
    if overrides:
        run.opts = [*(getattr(args, "opts", None) or []), *overrides]
    return run


def _warn_of_others(args: argparse.Namespace) -> None:
    after_another = any(text.startswith("dependency=") for text in args.slurm)
    if executor.JOB in args.output_dir or after_another or not (others := slurm.others_in(Path(args.output_dir))):
        return
    print(
        f"warning: --output-dir: there is already a job for {args.output_dir}: {', '.join(others)}; one that "
        "starts while another runs ends with an error. To run after it: --slurm dependency=afterany:"
        f"{others[-1].partition(' ')[0]}",
        file=sys.stderr,
    )


def _command() -> str:
    words = [word for word in sys.argv if word != "--dry-run"]
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join([sys.executable, *words])}"


def _requeue_for_submitit(code: int) -> None:
    """Do what submitit's own signal handler does, after the save instead of in the middle of a step.

    Not for a job that SLURM ends itself, as after scancel.
    """
    job = submitit.JobEnvironment().job_id  # SLURM_JOB_ID may stand for all tasks of an array
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    if describe_job(shown, time.time()).state != "RUNNING":
        return
    if world_from_environment(os.environ).rank == 0:
        subprocess.run(["scontrol", "requeue", job], check=False)
    raise SystemExit(code)  # without a result: the job is not over
