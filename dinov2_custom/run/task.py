"""One process of a launched run: ``python -m dinov2_custom.run.task SPEC``, started by srun or torch elastic.

SPEC is JSON: the task class, its arguments, the user's command line and the prefix of this process's output files. How
it ended is left for the launcher (``outcome.py``). Torch-free until the task runs. Read :func:`run` first.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2_custom import entry, exit_codes
from dinov2_custom.errors import DINOv2Error, LaunchError
from dinov2_custom.run import outcome
from dinov2_custom.run.outcome import Outcome
from dinov2_custom.world import world_from_environment

LAUNCHER = "DINOV2_LAUNCHER_PID"  # in the environment of processes that end with their launcher


def make_spec(task_class: type, args: argparse.Namespace, output_prefix: str, first_output: int) -> dict[str, Any]:
    """Describe ``task_class(args)`` so that another process can run it.

    Args:
        output_prefix: path that ``_<rank>_log.out`` is added to; ``%j`` stands for the SLURM job's number.
        first_output: the lowest rank whose output goes to such files; lower ones keep the launcher's.

    Raises:
        LaunchError: arguments that JSON cannot hold, or a class that cannot be found by its name.
    """
    if "<locals>" in task_class.__qualname__:
        raise LaunchError(f"expected a task class at the top of a file, got {task_class.__qualname__}; move it there")
    module = task_class.__module__
    where = str(Path(sys.modules[module].__file__ or "").absolute()) if module == "__main__" else module
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    spec = {
        "task": f"{where}:{task_class.__qualname__}",
        "args": values,
        "command": sys.argv,
        "output": output_prefix,
        "first_output": first_output,
    }
    try:
        json.dumps(spec)
    except TypeError as e:
        raise LaunchError(
            f"expected arguments of numbers, texts and lists, got {e}; convert them before submitting"
        ) from e
    return spec


def run(spec: dict[str, Any], environment: Mapping[str, str]) -> int:
    """Run the task of ``spec`` in this process and return its exit code; how it ended is written down.

    A stopped process then returns 0: after another code, srun and torch elastic would kill those that still save.
    """
    world = world_from_environment(environment)
    job = environment.get("SLURM_JOB_ID", "local")
    args = argparse.Namespace(**spec["args"])
    for name in ("output_dir", "config_file"):
        setattr(args, name, (getattr(args, name, None) or "").replace("%j", job))
    if world.rank >= spec["first_output"]:
        _redirect(spec["output"].replace("%j", job), world.rank)
    folder = environment.get(outcome.FOLDER_VARIABLE)
    if folder:
        _leave_word_on_signals(world.rank, Path(folder))
    if LAUNCHER in environment:
        name = "launcher"
        threading.Thread(target=_stop_without, args=(int(environment[LAUNCHER]),), name=name, daemon=True).start()
    if environment.get("SLURM_RESTART_COUNT", "0") != "0":
        _keep_the_work_of_earlier_attempts(args, job)
    sys.argv = list(spec["command"])
    ended = _ended(spec["task"], args, world.rank)
    if ended.kind == "crashed":
        _tell_main_log(Path(args.output_dir), ended)
    if folder:
        outcome.write(ended, Path(folder))
    return 0 if folder and ended.kind == "stopped" else ended.code


def _ended(task: str, args: argparse.Namespace, rank: int) -> Outcome:
    try:
        code = int(_task_class(task)(args)() or 0)
    except DINOv2Error as e:
        text = entry.words_of(e)
        print(f"error: {text}", file=sys.stderr)
        code = exit_codes.ERROR if e.exit_code is None else e.exit_code
        return Outcome(rank, "lost" if code == exit_codes.LOST_PROCESS else "refused", code, text)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except KeyboardInterrupt:
        return Outcome(rank, "stopped", exit_codes.stopped_by(signal.SIGINT))
    except Exception as e:
        trouble = entry.describe_no_room(e) if isinstance(e, OSError) else ""
        trouble = entry.missing_requirement(e) if isinstance(e, ModuleNotFoundError) else trouble
        if trouble:
            print(f"error: {trouble}", file=sys.stderr)
            return Outcome(rank, "refused", exit_codes.ERROR, trouble)
        text = traceback.format_exc()
        print(text, file=sys.stderr, end="")
        return Outcome(rank, "crashed", exit_codes.ERROR, text)
    kinds = {exit_codes.DONE: "done", exit_codes.LOST_PROCESS: "lost"}
    return Outcome(rank, kinds.get(code) or ("stopped" if code > 128 else "refused"), code)


def _task_class(name: str) -> type:
    where, _, qualified = name.rpartition(":")
    if where.endswith(".py"):
        module_spec = importlib.util.spec_from_file_location("dinov2_task", where)
        assert module_spec is not None and module_spec.loader is not None
        found: Any = importlib.util.module_from_spec(module_spec)
        sys.modules["dinov2_task"] = found
        module_spec.loader.exec_module(found)
    else:
        found = importlib.import_module(where)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


def _redirect(prefix: str, rank: int) -> None:
    """Send what this process and its libraries print to files of its own."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream, number in (("out", 1), ("err", 2)):
        file = os.open(f"{prefix}_{rank}_log.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
        os.close(file)


def _leave_word_on_signals(rank: int, folder: Path) -> None:
    """End at once on the signals that a training, once it runs, answers with a save; but say so to the launcher."""

    def leave(signum: int, frame) -> None:
        code = exit_codes.stopped_by(signum)
        outcome.write(Outcome(rank, "stopped", code), folder)
        os._exit(code)

    for signum in exit_codes.STOP_SIGNALS:
        if signum != signal.SIGINT:  # a KeyboardInterrupt, see _ended
            signal.signal(signum, leave)


def _stop_without(launcher: int) -> None:
    """Send this process a SIGTERM, so that it saves and ends, once ``launcher`` is gone: nobody else would stop it."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _keep_the_work_of_earlier_attempts(args: argparse.Namespace, job: str) -> None:
    """Drop ``--no-resume`` once this job itself has written a checkpoint."""
    folder = Path(args.output_dir)
    marker, submitted = folder / "last_checkpoint", folder / f"{job}_submission.sh"
    if getattr(args, "no_resume", False) and marker.exists() and submitted.exists():
        args.no_resume = marker.stat().st_mtime < submitted.stat().st_mtime


def _tell_main_log(folder: Path, ended: Outcome) -> None:
    """Add the traceback to the run's log, unless the task has done so."""
    log = folder / "logs" / "log.txt"
    if log.is_file() and ended.message.rstrip().splitlines()[-1] not in log.read_text(
        encoding="utf-8", errors="replace"
    ):
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"rank {ended.rank} ended with this error:\n{ended.message}")


if __name__ == "__main__":
    entry.leave(run(json.loads(sys.argv[1]), os.environ))
