"""Small helpers under upstream's names: weights into a model, seeds, git revision."""

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
    """Copy the tensors of a weight file into ``model`` by name, and log how many matched.

    The tensors may be at the top level or under ``checkpoint_key`` (else teacher, model, state_dict or student).
    Prefixes of wrappers and ``backbone.`` are ignored, block names match with and without chunks, and DINO and
    iBOT heads are skipped. Tensors of the model that the file lacks keep their values, with a warning.

    Args:
        pretrained_weights: path or http(s) URL of a ``.pth`` file; only tensors and plain containers are loaded.

    Raises:
        CheckpointError: the file is missing or not a weight file, shapes differ, or no name matches.
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

    This project does not use them; users' datasets and models may.
    """
    torch.manual_seed(seed)  # also seeds all CUDA devices
    np.random.seed(seed % 2**32)
    random.seed(seed)


def get_sha() -> str:
    """Return the git revision of this package as text: ``sha: ..., status: ..., branch: ...``.

    The status is ``clean`` or ``has uncommitted changes``; all three are N/A outside a git checkout.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a virtual environment inside another repository does not count
        status = "has uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else "clean"
        return f"sha: {git('rev-parse', 'HEAD')}, status: {status}, branch: {git('rev-parse', '--abbrev-ref', 'HEAD')}"
    except (OSError, subprocess.SubprocessError):
        return "sha: N/A, status: N/A, branch: N/A"


def has_batchnorms(model: nn.Module) -> bool:
    """Return whether ``model`` contains a batch normalisation of any kind."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
