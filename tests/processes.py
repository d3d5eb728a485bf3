"""Start commands and sources as several processes, with torchrun. Not here: starts under SLURM or ``--ngpus``."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
# As scripts in run/ end: a model at module level keeps its process group, whose threads must not meet Python's end.
LEAVE = "\nfrom dinov2_custom import entry\nentry.leave(0)\n"


def torchrun(processes: int, *command: str) -> list[str]:
    """Return the command that starts ``command``, a script and its arguments, ``processes`` times."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command]


def launch(processes: int, *command: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run ``command`` in so many processes, all of which have to end with 0."""
    options = {"env": os.environ | ENVIRONMENT, "cwd": REPOSITORY, "capture_output": True, "text": True}
    done = subprocess.run(torchrun(processes, *command), **options, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def launch_source(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run ``source`` with ``arguments`` in two processes; write it into ``folder``."""
    script = folder / "two.py"
    script.write_text(source + LEAVE)
    return launch(2, str(script), *arguments)
