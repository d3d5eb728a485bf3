"""Does torch see the GPUs that a job was given? Without them it would run on the CPU, for the price of the GPUs.

Torch is imported only where there are some. Read :func:`check_gpus` first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from dinov2_custom import entry
from dinov2_custom.errors import LaunchError

_NONE = ("", "-1", "NoDevFiles")


def check_gpus(environment: Mapping[str, str]) -> None:
    """Compare what SLURM, SkyPilot or the user say in ``environment`` with what torch sees.

    Raises:
        LaunchError: GPUs are named, and torch sees none.
    """
    names = ("CUDA_VISIBLE_DEVICES", "SKYPILOT_NUM_GPUS_PER_NODE")
    name = next((name for name in names if name in environment), "")
    given = environment.get(name, "").strip()
    if given in _NONE or (name == names[1] and given == "0"):
        return
    torch = entry.import_quietly("torch")
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None and torch.version.hip is None:
        why = "is a build without CUDA: install another (https://pytorch.org/get-started)"
    else:
        why = "cannot use them: see whether `nvidia-smi` works there, and whether its driver is new enough"
    raise LaunchError(
        f"expected to use the GPUs that {name}={given} names, got none: torch {torch.__version__} in {sys.executable} "
        f"{why}, or add --cpu to do without GPUs"
    )
