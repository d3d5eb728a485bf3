"""Run the checks of the host side of CUDA, ``inside_*.py``, in a process that has the stand-in of the CUDA runtime."""

import subprocess
import sys

import pytest

from tests.cuda_host.build import Unavailable
from tests.cuda_host.run import REPOSITORY, environment


@pytest.mark.parametrize("part", ["step", "data", "loop", "compute"])
def test_host_side_of_cuda(part):
    try:
        preloaded = environment()
    except Unavailable as e:
        pytest.skip(f"no stand-in of the CUDA runtime: {e}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/cuda_host/inside_{part}.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=preloaded, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
