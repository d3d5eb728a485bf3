"""Names and URLs of the released files, and padding to whole patches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.utils.download import fetch
from dinov2_custom.utils.weights import RELEASED_URL

_LETTERS = {"vit_small": "vits", "vit_base": "vitb", "vit_large": "vitl", "vit_giant2": "vitg"}


def model_name(arch_name: str, patch_size: int = 14, num_register_tokens: int = 0) -> str:
    """Return the released name of an architecture: ``dinov2_vits14`` or ``dinov2_vits14_reg4``."""
    registers = f"_reg{num_register_tokens}" if num_register_tokens else ""
    return f"dinov2_{_LETTERS[arch_name]}{patch_size}{registers}"


_make_dinov2_model_name = model_name  # upstream's name
_DINOV2_BASE_URL = RELEASED_URL


def released_file(arch: str, num_register_tokens: int, ending: str) -> Path:
    """Return the local copy, in torch.hub's folder, of a released file; ``ending``: ``pretrain`` or that of a head."""
    url = f"{RELEASED_URL}/{model_name(arch)}/{model_name(arch, 14, num_register_tokens)}_{ending}.pth"
    return fetch(url, Path(torch.hub.get_dir()) / "checkpoints")


def named(function: Callable, name: str, doc: str) -> Callable:
    """Return ``function`` under ``name``, for functions of the hub that differ in the architecture only."""
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


def refuse(name: str, part: str, instead: str) -> NoReturn:
    """Raise the error of a name of upstream's hub that this project does not provide."""
    raise DINOv2Error(
        f"{name}: expected an image backbone or classifier, got {part}, which this project does not have; "
        f'use {instead} here, or in a process of its own torch.hub.load("facebookresearch/dinov2", "{name}")'
    )


class CenterPadding(nn.Module):
    """Pad images (..., H, W) with zeros on all sides, so that H and W are multiples of ``multiple``."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        missing = [-side % self.multiple for side in (x.shape[-1], x.shape[-2])]  # F.pad takes the last dimension first
        return F.pad(x, list(itertools.chain.from_iterable((m // 2, m - m // 2) for m in missing)))
