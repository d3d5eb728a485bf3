"""Small helpers under upstream's names: weights into a model, seeds, git revision.

Read :func:`load_pretrained_weights` first.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dinov2_custom.teacher import load_weights
from dinov2_custom.utils.schedules import CosineScheduler
from dinov2_custom.utils.weights import flat_state, read_weights

__all__ = ["CosineScheduler", "fix_random_seeds", "get_sha", "has_batchnorms", "load_pretrained_weights"]


def load_pretrained_weights(
    model: nn.Module, pretrained_weights: str | os.PathLike, checkpoint_key: str | None
) -> None:
    """Copy the tensors of a weight file into ``model`` by name, and say how many matched.

    The file may hold the tensors directly or under ``checkpoint_key`` (else teacher, model, state_dict or student).
    Prefixes of wrappers and ``backbone.`` do not count, block names with and without chunks fit each other, DINO and
    iBOT heads are left out. Tensors of the model that the file lacks keep their values, with a warning.

    Args:
        pretrained_weights: path or http(s) URL of a ``.pth`` file; only tensors and plain containers are unpickled.

    Raises:
        CheckpointError: no such file, not a weight file, tensors of other shapes, or not one name that matches.
    """
    load_weights(
        model,
        pretrained_weights,
        flat_state(read_weights(pretrained_weights), checkpoint_key),
        key="pretrained_weights",
        what=type(model).__name__,
        advice="use the arch, patch size and crop size that they were trained with",
        optional=model.state_dict().keys(),
        allow_unexpected=True,
    )


def fix_random_seeds(seed: int = 31) -> None:
    """Seed the global generators of torch, numpy and Python.

    Nothing of this project draws from them; it is for the user's own datasets and models.
    """
    torch.manual_seed(seed)  # all CUDA devices too
    np.random.seed(seed % 2**32)
    random.seed(seed)


def get_sha() -> str:
    """Describe the git revision this package runs from: ``sha: ..., status: ..., branch: ...``.

    The status is ``clean`` or ``has uncommitted changes``; all three are N/A outside a git checkout.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment inside somebody else's repository is not it
        status = "has uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else "clean"
        return f"sha: {git('rev-parse', 'HEAD')}, status: {status}, branch: {git('rev-parse', '--abbrev-ref', 'HEAD')}"
    except (OSError, subprocess.SubprocessError):
        return "sha: N/A, status: N/A, branch: N/A"


def has_batchnorms(model: nn.Module) -> bool:
    """Return whether ``model`` contains a batch normalisation of any kind."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
