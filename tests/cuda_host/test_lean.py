"""Run ``inside_lean.py``: limits on the cost of CUDA's host side, in a process with the stand-in of the runtime."""

import subprocess
import sys

from tests.cuda_host.run import REPOSITORY


def test_what_the_host_side_of_cuda_costs(preloaded):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda_host/inside_lean.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=preloaded, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
