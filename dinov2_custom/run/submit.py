"""Launch a task as a SLURM job, on this machine, or in this process, under upstream's names.

Submission does not import torch, and the configuration is checked before anything is started.
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
from typing import Any, ClassVar

import submitit

from dinov2_custom import entry, errors
from dinov2_custom.configs.paths import absent, check_output_dir, resolve_output_dir
from dinov2_custom.errors import CONSOLE_SCRIPT, LaunchError, command
from dinov2_custom.run import args as launch_args
from dinov2_custom.run import environment, local, refusal, slurm
from dinov2_custom.run.args import LAUNCH_DESTS, SLURM_DESTS, get_args_parser
from dinov2_custom.run.process import Process
from dinov2_custom.run.requeue import describe_job
from dinov2_custom.utils.cluster import get_user_checkpoint_path
from dinov2_custom.world import TORCHRUN_VARIABLES, World, world_from_environment


class Task:
    """The work of each process of a run: ``main(args)`` of a module that is imported only on the node.

    Subclasses define the module, the job name, the script in ``run/`` and the parser of the task's flags. Instances can
    be passed directly to submitit's executors.
    """

    module: ClassVar[str] = ""
    name: ClassVar[str] = ""
    script: ClassVar[str] = ""
    get_parser: ClassVar[Callable[..., argparse.ArgumentParser]]

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @classmethod
    def launch(cls, arguments: Sequence[str] | None = None) -> int:
        """Parse the command line including the launcher's flags, launch, and return the exit code."""
        return submit_jobs(cls, cls.parser().parse_args(arguments), cls.name)

    @classmethod
    def parser(cls) -> launch_args.LaunchParser:
        """Return the parser of the task's and the launcher's flags."""
        own = cls.get_parser(add_help=False)
        parser = get_args_parser(own.description, parents=[own])
        parser.prog = command(cls.script)
        return parser

    def prepare(self, warn: Callable[[str], None]) -> str | None:
        """Check ``args`` before anything is started; return the complete configuration as YAML, if any.

        Sets ``args.output_dir`` if the configuration defines it; calls ``warn`` with each warning.

        Raises:
            DINOv2Error: for anything that would end the run.
        """
        return None

    def __call__(self) -> int:
        """Run in this process, whose rank is in the environment, and return the exit code.

        Raises:
            LaunchError: if GPUs were allocated that torch does not find.
        """
        # spinning threads slow down data loading on a CPU; torch reads this variable at import
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        check_gpus(os.environ)
        code = int(entry.import_quietly(self.module).main(self.args) or 0)
        if errors.should_restart(code) and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            _requeue_for_submitit(code)
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the submission with which submitit requeues the task; it resumes from the checkpoint on disk."""
        return submitit.helpers.DelayedSubmission(type(self)(self.args))


def check_gpus(environment: Mapping[str, str]) -> None:
    """Check that torch can use GPUs if SLURM, SkyPilot or the user name any in ``environment``, or the machine has any.

    Otherwise the run would train on the CPU while occupying the GPUs.

    Raises:
        LaunchError: if there are GPUs, or names of GPUs, and torch cannot use any.
    """
    names = ("CUDA_VISIBLE_DEVICES", "SKYPILOT_NUM_GPUS_PER_NODE")
    name = next((name for name in names if name in environment), "")
    given = environment.get(name, "").strip()
    if (name and given in ("", "-1", "NoDevFiles")) or (name == names[1] and given == "0"):
        return
    torch = entry.import_quietly("torch")
    if torch.cuda.is_available():
        return
    # counted by NVML, which also works with a driver that is too old for this torch
    if not name and not (count := torch.cuda.device_count()):
        return
    which = f"GPUs that {name}={given} names" if name else f"{count} GPUs of this machine"
    if torch.version.cuda is None and torch.version.hip is None:
        why = "is a build without CUDA: install another (https://pytorch.org/get-started)"
    else:
        why = "cannot use them: check that `nvidia-smi` works there, and that its driver is new enough"
    raise LaunchError(
        f"expected to use the {which}, got none: torch {torch.__version__} in {sys.executable} {why}, or add "
        "--cpu to run without GPUs"
    )


def get_shared_folder() -> Path:
    """Return the shared folder of this user's runs: DINOV2_CHECKPOINT_PATH/<user>/experiments, or ./outputs."""
    folder = get_user_checkpoint_path()
    return folder / "experiments" if folder else Path("outputs").absolute()


def submit_jobs(task_class: type, args: argparse.Namespace, name: str) -> int:
    """Launch ``task_class(args)`` according to ``args``; return the exit code (0 once a SLURM job is submitted).

    Args:
        task_class: a :class:`Task`, or any class at module level that takes ``args`` and whose instances are callable.
        args: arguments parsed by :func:`get_args_parser`, with ``output_dir``.
        name: name of the SLURM job.

    Raises:
        DINOv2Error: if flags, configuration, environment or cluster are unsuitable; no files are left behind.
    """
    for dest in (*LAUNCH_DESTS, "output_dir"):
        setattr(args, dest, getattr(args, dest, None))
    launcher = choose_launcher(args, os.environ)
    if launcher == "slurm":
        return _submit(task_class, args, name)
    args.output_dir = (args.output_dir or "").replace(slurm.JOB, os.environ.get("SLURM_JOB_ID", "local"))
    # set by an enclosing job, such as a notebook started by submitit, which must not be requeued
    os.environ.pop("SUBMITIT_EXECUTOR", None)
    if args.cpu:  # for this process and its children; torch reads the variable on first use
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    checked = args
    if launcher == "inline":
        world = world_from_environment(os.environ)
        if unused := unused_counts(args, world):
            print(f"warning: {unused}", file=sys.stderr)
        # optim.global_batch is divided by the world size; the existing ranks choose the directory together
        checked = argparse.Namespace(**vars(args) | {"ngpus": world.size, "nodes": 1})
    else:
        for variable in TORCHRUN_VARIABLES:  # left over in the shell
            os.environ.pop(variable, None)
    # report errors in the arguments before what this machine lacks
    config = _prepare(task_class, checked, warn=lambda text: None)  # the processes repeat the warnings
    processes = 1 if launcher == "inline" else local.num_processes(args)
    if args.dry_run:
        print(f"# {launcher}, {processes} processes: {_command()}\n{config or ''}", end="")
        return errors.DONE
    return int(task_class(args)() or 0) if processes == 1 else local.launch(task_class, args, processes)


def choose_launcher(args: argparse.Namespace, environment: Mapping[str, str]) -> str:
    """Return "slurm", "local" or "inline"; see ``--launcher``.

    Raises:
        LaunchError: if SLURM flags are given for another launcher.
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
    """Return whether torchrun or srun started this process; raise for incomplete variables only if ``strict``."""
    try:
        return "TORCHELASTIC_RUN_ID" in environment or world_from_environment(environment).size > 1
    except LaunchError:
        if strict:
            raise
        return False


def unused_counts(args: argparse.Namespace, world: World) -> str:
    """Return a warning (on rank 0) if ``--ngpus`` or ``--nodes`` contradict the actual processes, else ""."""
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
    """Check the arguments and set the absolute output directory, which all processes must share."""
    made = task_class(args)
    config = made.prepare(warn) if isinstance(made, Task) else None
    args.output_dir = resolve_output_dir(args.output_dir, None)
    return config


def warn_of_absent(name: str, value: Any, warn: Callable[[str], None]) -> None:
    """Warn of paths in ``value``, the value of the key or flag ``name``, that do not exist on this machine.

    This is no error because the disks of the nodes may not be mounted here.
    """
    for path in absent(value):
        warn(f"{name}: found nothing at {path} on this machine; the job ends with an error unless its nodes have it")


def _submit(task_class: type, args: argparse.Namespace, name: str) -> int:
    launch_args.fill_in(args)
    given = getattr(args, "opts", None) or []
    runs = [argparse.Namespace(**vars(args) | {"opts": [*given, *values]}) for values in product(*args.sweep)]
    warnings: list[str] = []
    configs = [_prepare(task_class, run, warnings.append) for run in runs]
    args.output_dir = resolve_output_dir(args.output_dir or runs[0].output_dir, None)
    for number, run in enumerate(runs):
        run.output_dir = f"{args.output_dir}/{number}" if args.sweep else args.output_dir
    if slurm.JOB not in args.output_dir:
        check_output_dir(args.output_dir)
    elif args.sweep:
        raise LaunchError(f"--output-dir: expected no {slurm.JOB} with --sweep, got {args.output_dir}; leave it out")
    env = environment.resolve(args, os.environ)
    if missing := [name for name in env.missing if name == "submitit" or issubclass(task_class, Task)]:
        raise LaunchError(
            f"--venv, --conda-env, --python: expected an environment with {', '.join(missing)}, found none for "
            f"{env.python}; install them with `{env.python} -m pip install -e {Path(__file__).resolve().parents[2]}`"
        )
    if args.cpus_per_task is None:
        args.cpus_per_task = refusal.cpus_per_task(args.ngpus, args.partition)
    parameters = slurm.parameters(args, name, env, _command())
    script = slurm.script(parameters, args.output_dir, len(runs))
    slurm.check_syntax(script)
    if not args.dry_run:  # last: report errors the user can fix before what this machine lacks
        slurm.check_installed()
        _warn_of_others(args, warnings.append)
    for text in dict.fromkeys(warnings):
        print(f"warning: {text}", file=sys.stderr)
    if args.dry_run:
        print(script, *(f"# configuration\n{config}" for config in configs if config), sep="\n", end="", flush=True)
        accepted, words = slurm.test_only(script)
        print(f"# {words}", file=sys.stderr)
        return errors.DONE if accepted else errors.ERROR
    processes = [Process(task_class, run, config) for run, config in zip(runs, configs, strict=True)]
    job_id, folder, state = slurm.submit(parameters, args.output_dir, processes)
    first = runs[0].output_dir.replace(slurm.JOB, job_id)
    logs = (f"{folder}/{job_id}{'_0' if args.sweep else ''}_log.out", f"{first}/logs/log.txt")
    print(f"job {job_id} {state}\nfiles: {folder}")
    if args.sweep:
        print(*(f"{run.output_dir}: {' '.join(run.opts[-len(args.sweep) :])}" for run in runs), sep="\n")
    print(f"follow: tail -F {shlex.join(logs)}\nstop: scancel {job_id}")
    return errors.DONE


def _warn_of_others(args: argparse.Namespace, warn: Callable[[str], None]) -> None:
    """Warn of this user's pending or running jobs for the same directory, unless the new job depends on another."""
    folder = Path(args.output_dir)
    known = {path.name.removesuffix("_submission.sh") for path in folder.glob("*_submission.sh")}
    if not known or any(text.startswith("dependency=") for text in args.slurm):
        return
    listed = refusal.ask("squeue", "--me", "--noheader", "--format", "%i %T").splitlines()
    if others := [line for line in listed if line.partition(" ")[0].partition("_")[0] in known]:
        warn(
            f"--output-dir: there is already a job for {folder}: {', '.join(others)}; one that starts while another "
            f"runs ends with an error. To run after it: --slurm dependency=afterany:{others[-1].partition(' ')[0]}"
        )


def _command() -> str:
    words = [word for word in sys.argv if word != "--dry-run"]
    interpreter = [] if words[0] == CONSOLE_SCRIPT else [sys.executable]  # of the Python functions, see api.py
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join([*interpreter, *words])}"


def _requeue_for_submitit(code: int) -> None:
    """Requeue as submitit's own signal handler does, but after the save instead of in the middle of a step.

    A job that SLURM is ending, such as after scancel, is not requeued.
    """
    job = submitit.JobEnvironment().job_id  # SLURM_JOB_ID may denote a whole array
    if describe_job(refusal.ask("scontrol", "show", "job", job), time.time()).state != "RUNNING":
        return
    if world_from_environment(os.environ).rank == 0:
        subprocess.run(["scontrol", "requeue", job], check=False)
    raise SystemExit(code)  # exit without a result, because the job is not complete
