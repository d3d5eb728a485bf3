"""The callable that every process of a launched run executes: a task class with its arguments.

submitit pickles it for a SLURM job, ``local.py`` for processes of this machine. It holds no training state, which is in
the checkpoint on disk. The outcome of each process of a job is in submitit's ``<job>_<rank>_result.pkl``, which
``requeue.py`` reads. torch is not imported until the task runs.
"""

from __future__ import annotations

import argparse
import base64
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import cloudpickle  # a dependency of submitit
import submitit
from submitit.core import utils as submitit_utils

from dinov2_custom import entry, errors
from dinov2_custom.errors import DINOv2Error

VARIABLE = "DINOV2_PROCESS"  # holds (process id of the local launcher, Process), pickled


class Process:
    """``task_class(args)`` in one process.

    Args:
        config: YAML text of the configuration as checked at submission, which the job uses.
    """

    def __init__(self, task_class: type, args: argparse.Namespace, config: str | None = None) -> None:
        self.task_class, self.args, self.config, self.command = task_class, args, config, list(sys.argv)

    def __call__(self) -> NoReturn:
        """Run as a task of a SLURM job, save the outcome for the batch script, and exit.

        A stopped process exits with 0: for any other code srun would kill the processes that are still saving.
        """
        paths = submitit.JobEnvironment().paths
        del os.environ["SUBMITIT_EXECUTOR"]  # the batch script requeues, not the task

        def leave(signum: int, frame) -> None:
            _keep(paths.result_pickle, ("success", errors.stopped_by(signum)))
            os._exit(0)

        # submitit's handlers checkpoint in the middle of a step and ignore SIGTERM; training installs its own later
        for signum in errors.STOP_SIGNALS:
            signal.signal(signum, leave)
        self.args.output_dir = (self.args.output_dir or "").replace("%j", str(paths.job_id))
        if self.config is not None:
            file = paths.folder / f"{paths.job_id}_config.yaml"
            own = file.with_name(f"{file.name}.{paths.task_id}")
            own.write_text(self.config, encoding="utf-8", errors="surrogateescape")
            own.replace(file)  # every rank writes the same text
            self.args.config_file, self.args.opts = str(file), []
        if os.environ.get("DINOV2_RESUME"):
            self.args.no_resume = False
        code, text = self.run(paths.task_id)
        failed = text and code != errors.LOST_PROCESS
        _keep(paths.result_pickle, ("error", text) if failed else ("success", code))
        entry.leave(0 if code > 128 else code)

    def run(self, rank: int) -> tuple[int, str]:
        """Run the task; return its exit code and the error message or traceback that ended it, which is printed."""
        sys.argv = list(self.command)
        try:
            return int(self.task_class(self.args)() or 0), ""
        except KeyboardInterrupt:
            return errors.stopped_by(signal.SIGINT), ""
        except SystemExit as e:
            return e.code if isinstance(e.code, int) else 0 if e.code is None else errors.ERROR, ""
        except Exception as e:
            sentence, code = entry.sentence_of(e), e.exit_code if isinstance(e, DINOv2Error) else None
            text = sentence or traceback.format_exc()
            print(f"error: {text}" if sentence else text, file=sys.stderr)
            if not sentence:
                _add_to_main_log(Path(self.args.output_dir), rank, text)
            return errors.ERROR if code is None else code, text


def to_variable(process: Process) -> str:
    """Return the value of ``VARIABLE``. Unlike a file, an environment variable vanishes with its processes."""
    return base64.b64encode(cloudpickle.dumps((os.getpid(), process))).decode()


def main(prefix: str) -> int:
    """Run the Process stored in the environment locally; write a fatal error to ``<prefix>_<rank>.error``.

    Ranks above 0 print to ``<prefix>_<rank>_log.out`` and ``.err``.
    """
    rank = int(os.environ["RANK"])
    if rank:
        _redirect(f"{prefix}_{rank}_log")
    launcher, process = pickle.loads(base64.b64decode(os.environ.pop(VARIABLE)))
    threading.Thread(target=_stop_when_gone, args=(launcher,), name="launcher", daemon=True).start()
    code, text = process.run(rank)
    if text and code != errors.LOST_PROCESS:
        file = Path(f"{prefix}_{rank}.error")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
    return code


def _keep(path: Path, result: tuple[str, Any]) -> None:
    """Write a result as submitit does, readable only by this user."""
    own = path.with_name(f"{path.name}.save_tmp")
    os.close(os.open(own, os.O_WRONLY | os.O_CREAT, 0o600))
    submitit_utils.cloudpickle_dump(result, own)
    own.replace(path)


def _redirect(prefix: str) -> None:
    """Redirect the output of this process and its libraries to its own files."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    for stream, number in (("out", 1), ("err", 2)):
        file = os.open(f"{prefix}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
        os.close(file)


def _stop_when_gone(launcher: int) -> None:
    """Send SIGTERM to this process once ``launcher`` has ended, so that it saves and exits instead of running on."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _add_to_main_log(folder: Path, rank: int, text: str) -> None:
    """Add the traceback to the run's log unless the task has already done so."""
    log = folder / "logs" / "log.txt"
    if log.is_file() and text.rstrip().splitlines()[-1] not in log.read_text(encoding="utf-8", errors="replace"):
        with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"rank {rank} ended with this error:\n{text}")


if __name__ == "__main__":
    entry.leave(main(*sys.argv[1:]))
