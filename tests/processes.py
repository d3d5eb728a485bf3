"""Start commands and sources as several processes, with torchrun, and wait for what processes do.

Not here: starts under SLURM or ``--ngpus``.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
CEILING_S = 600  # of any wait: a machine may be busy with other things, and no test says anything about speed
# As scripts in run/ end: a model at module level keeps its process group, whose threads must not meet Python's end.
LEAVE = "\nfrom dinov2_custom import entry\nentry.leave(0)\n"


def torchrun(processes: int, *command: str) -> list[str]:
    """Return the command that starts ``command``, a script and its arguments, ``processes`` times."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]


def launch(processes: int, *command: str) -> subprocess.CompletedProcess:
    """Run ``command`` in so many processes, all of which have to end with 0."""
    options = {"env": os.environ | ENVIRONMENT, "cwd": REPOSITORY, "capture_output": True, "text": True}
    done = subprocess.run(torchrun(processes, *command), **options, timeout=CEILING_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def launch_source(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run ``source`` with ``arguments`` in two processes; write it into ``folder``."""
    script = folder / "two.py"
    script.write_text(source + LEAVE)
    return launch(2, str(script), *arguments)


def wait_until(condition: Callable[[], Any], what: str, of: Sequence[subprocess.Popen] = ()) -> Any:
    """Return what ``condition()`` returns once it is true; fail when a process of ``of``, which bring it, ended."""
    deadline = time.monotonic() + CEILING_S
    while not (found := condition()):
        assert all(process.poll() is None for process in of), f"a process ended before {what}"
        assert time.monotonic() < deadline, f"{what}: not in {CEILING_S} s"
        time.sleep(0.02)
    return found
