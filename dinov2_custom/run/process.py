"""What every process of a launched run executes: a task class with its arguments, never the state of a run.

submitit pickles it for a SLURM job, ``local.py`` for processes on this machine; the state is in the checkpoint on disk.
How a process of a job ended is kept in submitit's ``<job>_<rank>_result.pkl``, which ``requeue.py`` reads. Torch-free
until the task runs. Read :class:`Process` first.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import submitit
from submitit.core import utils as submitit_utils

from dinov2_custom import entry, errors
from dinov2_custom.errors import DINOv2Error

LAUNCHER = "DINOV2_LAUNCHER_PID"  # in the environment of processes that end with their launcher


class Process:
    """``task_class(args)`` in one process.

    Args:
        config: YAML text of the configuration that was checked at submission: the job runs this one.
    """

    def __init__(self, task_class: type, args: argparse.Namespace, config: str | None = None) -> None:
        self.task_class, self.args, self.config, self.command = task_class, args, config, list(sys.argv)

    def __call__(self) -> NoReturn:
        """Run as a task of a SLURM job: leave how it ended for the batch script, and end this process.

        A stopped process ends with 0: after another code srun would kill those that still save.
        """
        paths = submitit.JobEnvironment().paths
        del os.environ["SUBMITIT_EXECUTOR"]  # the batch script requeues, not the task

        def leave(signum: int, frame) -> None:
            _keep(paths.result_pickle, ("success", errors.stopped_by(signum)))
            os._exit(0)

        # submitit's handlers checkpoint in the middle of a step and ignore SIGTERM; the training brings its own later
        for signum in errors.STOP_SIGNALS:
            signal.signal(signum, leave)
        self.args.output_dir = (self.args.output_dir or "").replace("%j", str(paths.job_id))
        if self.config is not None:
            file = paths.folder / f"{paths.job_id}_config.yaml"
            own = file.with_name(f"{file.name}.{paths.task_id}")
            own.write_text(self.config, encoding="utf-8")
            own.replace(file)  # the same text from every rank
            self.args.config_file, self.args.opts = str(file), []
        if os.environ.get("DINOV2_RESUME"):
            self.args.no_resume = False
        code, text = self.run(paths.task_id)
        failed = text and code != errors.LOST_PROCESS
        _keep(paths.result_pickle, ("error", text) if failed else ("success", code))
        entry.leave(0 if code > 128 else code)

    def run(self, rank: int) -> tuple[int, str]:
        """Run the task; return its exit code, and the sentence or traceback that ended it, which is printed."""
        sys.argv = list(self.command)
        try:
            return int(self.task_class(self.args)() or 0), ""
        except KeyboardInterrupt:
            return errors.stopped_by(signal.SIGINT), ""
        except SystemExit as e:
            return e.code if isinstance(e.code, int) else 0 if e.code is None else errors.ERROR, ""
        except Exception as e:
            code = e.exit_code if isinstance(e, DINOv2Error) else None
            text = _sentence(e)
            print(f"error: {text}" if text else traceback.format_exc(), file=sys.stderr)
            if not text:
                text = traceback.format_exc()
                _add_to_main_log(Path(self.args.output_dir), rank, text)
            return errors.ERROR if code is None else code, text


def main(scratch: str, output_prefix: str) -> int:
    """Run the Process in ``scratch`` as a local one, and leave there the text that ended it.

    Ranks above 0 print to ``<output_prefix>_<rank>_log.out`` and ``.err``.
    """
    rank = int(os.environ["RANK"])
    if rank:
        _redirect(f"{output_prefix}_{rank}_log")
    launcher = int(os.environ[LAUNCHER])
    threading.Thread(target=_stop_without, args=(launcher,), name="launcher", daemon=True).start()
    code, text = submitit_utils.pickle_load(f"{scratch}/process.pkl").run(rank)
    if text and code != errors.LOST_PROCESS:
        Path(scratch, f"{rank}.error").write_text(text, encoding="utf-8")
    return code


def _sentence(error: Exception) -> str:
    """Return one sentence for an error that a user can fix, "" for anything else."""
    if isinstance(error, DINOv2Error):
        return entry.words_of(error)
    if isinstance(error, OSError):
        return entry.describe_no_room(error)
    return entry.missing_requirement(error) if isinstance(error, ModuleNotFoundError) else ""


def _keep(path: Path, result: tuple[str, Any]) -> None:
    """Write a result as submitit does, readable for this user alone."""
    own = path.with_name(f"{path.name}.save_tmp")
    os.close(os.open(own, os.O_WRONLY | os.O_CREAT, 0o600))
    submitit_utils.cloudpickle_dump(result, own)
    own.replace(path)


def _redirect(prefix: str) -> None:
    """Send what this process and its libraries print to files of its own."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    for stream, number in (("out", 1), ("err", 2)):
        file = os.open(f"{prefix}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
        os.close(file)


def _stop_without(launcher: int) -> None:
    """Send this process a SIGTERM, so that it saves and ends, once ``launcher`` is gone: nobody else would stop it."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _add_to_main_log(folder: Path, rank: int, text: str) -> None:
    """Add the traceback to the run's log, unless the task has done so."""
    log = folder / "logs" / "log.txt"
    if log.is_file() and text.rstrip().splitlines()[-1] not in log.read_text(encoding="utf-8", errors="replace"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"rank {rank} ended with this error:\n{text}")


if __name__ == "__main__":
    entry.leave(main(*sys.argv[1:]))
