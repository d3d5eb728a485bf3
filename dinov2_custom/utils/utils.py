"""Small helpers under upstream's names: weights into a model, seeds, git revision.

Read :func:`load_pretrained_weights` first.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils.schedules import CosineScheduler

__all__ = ["CosineScheduler", "fix_random_seeds", "get_sha", "has_batchnorms", "load_pretrained_weights"]

logger = logging.getLogger("dinov2")

_WRAPPING_KEYS = ("teacher", "model", "state_dict", "student")
_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:module|backbone|_orig_mod|_fsdp_wrapped_module)\.")
_HEADS = ("dino_head.", "ibot_head.")


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
    state = _unwrap(_read_weights(pretrained_weights), checkpoint_key)
    state = {_plain_name(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    wanted = model.state_dict()
    names = {_plain_name(name): name for name in wanted}
    found = {names[key]: value for key, value in state.items() if key in names}
    unused = [key for key in state if key not in names and not key.startswith(_HEADS)]
    missing = [name for name in wanted if name not in found]
    if not found:
        raise CheckpointError(
            f"expected the weights of {type(model).__name__} in {pretrained_weights}, got {len(state)} tensors with "
            f"other names: {_some(state)} instead of {_some(wanted)}. Check that the file fits the configuration."
        )
    misshapen = [
        f"{name} {tuple(value.shape)} instead of {tuple(wanted[name].shape)}"
        for name, value in found.items()
        if value.shape != wanted[name].shape
    ]
    if misshapen:
        raise CheckpointError(
            f"expected tensors of the model's shapes in {pretrained_weights}, got {len(misshapen)} of other shapes: "
            f"{_some(misshapen)}. Use the arch, patch size and crop size that the weights were trained with."
        )
    model.load_state_dict(found, strict=False)
    logger.info(
        f"{pretrained_weights}: {len(found)} of {len(wanted)} tensors matched ({len(found) / len(wanted):.0%}), "
        f"{len(missing)} missing, {len(unused)} unused"
    )
    if missing or unused:
        logger.warning(f"{pretrained_weights}: missing: {_some(missing)}; unused: {_some(unused)}")


def _read_weights(source: str | os.PathLike) -> Any:
    advice = "Give the path or URL of a .pth file of tensors."
    try:
        if str(source).startswith(("http://", "https://")):
            return torch.hub.load_state_dict_from_url(str(source), map_location="cpu", weights_only=True)
        return torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise CheckpointError(f"expected a weight file at {source}, found none. {advice}") from e
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        reason = str(e).partition("\n")[0]
        raise CheckpointError(f"expected a weight file at {source}, could not read it: {reason}. {advice}") from e


def _unwrap(state: Any, checkpoint_key: str | None) -> Mapping[str, Any]:
    if not isinstance(state, Mapping):
        raise CheckpointError(f"expected a weight file that holds a dict of tensors, got a {type(state).__name__}")
    for key in (checkpoint_key, *_WRAPPING_KEYS):
        if key is not None and isinstance(state.get(key), Mapping):
            logger.info(f"taking the weights under {key!r}")
            return state[key]
    return state


def _plain_name(name: str) -> str:
    """Return ``name`` without prefixes, and with ``blocks.<chunk>.<i>.`` as ``blocks.<i>.`` (i counts all blocks)."""
    return re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", _PREFIXES.sub("", name))


def _some(names: Any, count: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + more


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
