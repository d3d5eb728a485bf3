"""Run Python under the stand-in of the CUDA runtime: ``python -m tests.cuda_host.run SCRIPT|-m MODULE [arguments]``.

With ``--compute`` first, operations on "device" tensors have real values (``compute.py``), and several processes can
communicate: through gloo, since there is no NCCL.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from pathlib import Path

from tests.cuda_host.build import Unavailable, build

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(tempfile.gettempdir()) / f"dinov2_custom_cuda_host_{os.getuid()}"


def environment() -> dict[str, str]:
    """Return the environment in which a Python process has the stand-in. Raise as :func:`build` does."""
    own = {"LD_PRELOAD": str(build(FOLDER)), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return os.environ | own


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--compute"]:
        arguments = ["-m", "tests.cuda_host.run", "--computed", *arguments[1:]]
    if arguments[:1] == ["--computed"]:
        _run_computed(arguments[1:])
        return
    try:
        os.execve(sys.executable, [sys.executable, *arguments], environment())
    except Unavailable as e:
        sys.exit(f"error: the stand-in of the CUDA runtime cannot be built: {e}")


def _run_computed(arguments: list[str]) -> None:
    from torch import distributed

    from tests.cuda_host.compute import Computing

    start = distributed.init_process_group
    distributed.init_process_group = lambda backend, *args, **options: start(
        backend.replace("nccl", "gloo"), *args, **options
    )
    with Computing():
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
