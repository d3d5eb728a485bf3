"""Run the checks of the host side of CUDA, ``inside_*.py``, in a process with the stand-in of the CUDA runtime."""

import subprocess
import sys

import pytest

from tests.cuda_host.run import REPOSITORY


@pytest.mark.parametrize("part", ["step", "data", "loop", "update", "device"])
def test_host_side_of_cuda(part, preloaded):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/cuda_host/inside_{part}.py"]
    done = subprocess.run(command, cwd=REPOSITORY, env=preloaded, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_for_a_real_card_run_here(preloaded):
    command = [sys.executable, "-m", "tests.cuda_host.run", "--compute", "-m", "pytest", "-q", "-rs", "tests/gpu"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed, 1 skipped" in done.stdout, done.stdout  # all but Triton's kernels
