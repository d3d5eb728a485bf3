"""Gated feed-forward networks: w3(silu(gate) * value) (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom.layers.backend import xformers_flag
from dinov2_custom.layers.pieces import gated

__getattr__ = xformers_flag  # XFORMERS_AVAILABLE and XFORMERS_ENABLED, upstream's names


class SwiGLUFFN(nn.Module):
    """SwiGLU with gate and value in one linear layer ``w12``, gate first. ``act_layer`` and ``drop`` are not used."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(gated(self.w12(x)))


def aligned_hidden_features(hidden_features: int, multiple: int = 8) -> int:
    """Return two thirds of ``hidden_features``, rounded up to ``multiple``: an MLP's parameter count, fast shapes."""
    return -(-int(hidden_features * 2 / 3) // multiple) * multiple


class SwiGLUFFNFused(SwiGLUFFN):
    """SwiGLU of hidden width :func:`aligned_hidden_features` of the one given (ViT-S 1024, B 2048, L 2736, g 4096)."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_features=in_features,
            hidden_features=aligned_hidden_features(hidden_features or in_features),
            out_features=out_features or in_features,
            bias=bias,
        )


class SwiGLUFFNAligned(nn.Module):
    """SwiGLU with separate gate ``w1`` and value ``w2`` and a hidden width aligned to ``align_to``."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
        align_to: int = 8,
        device=None,
    ) -> None:
        super().__init__()
        hidden = aligned_hidden_features(hidden_features or in_features, align_to)
        self.w1 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.w2 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.w3 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))
