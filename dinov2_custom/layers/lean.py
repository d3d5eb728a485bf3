"""Linear layers that save for the backward pass the smallest tensor it can be computed from.

A norm or an activation before a linear layer is recomputed instead of saved, and the LayerScale after it needs no
tensor at all. This saves half of what autograd would. The formulas are unchanged; products use the precision of the
autocast region. The functions between the products are in ``pieces``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom.layers.pieces import EAGER, Pieces


class Activation(NamedTuple):
    """A function without parameters, applied to (T, D).

    Attributes:
        backward: (gradient of the result, which it may overwrite, x) -> (the result, recomputed, the gradient of x).
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def gelu_activation(approximate: str, pieces: Pieces) -> Activation:
    """Return the activation of ``nn.GELU(approximate)``."""

    def backward(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return pieces.gelu_backward_(gradient, x, approximate), gradient

    return Activation(lambda x: pieces.gelu(x, approximate), backward)


def gated_activation(pieces: Pieces) -> Activation:
    """Return the activation of SwiGLU, silu(gate) * value."""
    return Activation(pieces.gated, pieces.gated_backward)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of products with ``x`` in this context: the autocast region's, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, pieces: Pieces = EAGER) -> Tensor:
    """Return linear(norm(x)) of (T, D), saving only x, in the precision of the product."""
    weights = norm.weight, norm.bias, linear.weight, linear.bias
    return _NormLinear.apply(x, *weights, norm.eps, compute_dtype(x), pieces)


def activation_linear(
    x: Tensor,
    activation: Activation | None,
    linear: nn.Linear,
    gamma: Tensor | None = None,
    scale: float = 1.0,
    pieces: Pieces = EAGER,
) -> Tensor:
    """Return scale * gamma * linear(activation(x)) of (T, D'), saving only x; None: no activation or no gamma.

    Source: d / d gamma = rowsum(dW * W) + db * b, where dW and db are the layer's gradients before scaling.
    """
    dtype = compute_dtype(x)
    in_weights = gamma is not None and dtype != torch.float16  # times 1e-5, weights are below float16's smallest number
    factor = times(gamma, scale) if in_weights else None
    out = _ActivationLinear.apply(x, linear.weight, linear.bias, factor, activation, dtype, pieces)
    if in_weights:
        return out
    return times(out if gamma is None else out * gamma, scale)


def times(x: Tensor, scale: float) -> Tensor:
    """Return scale * x, or x itself if ``scale`` is 1."""
    return x if scale == 1.0 else x * scale


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a region without autocast; compiled pieces would be compiled again for an autocast region."""
    return torch.autocast(x.device.type, enabled=False)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps, dtype, pieces):
        with without_autocast(x):
            if x.dtype == dtype:
                kept, normed = x, pieces.norm(x, norm_weight, norm_bias, eps)
            else:
                kept, normed = pieces.cast_norm(x, norm_weight, norm_bias, eps, dtype)
            ctx.save_for_backward(kept, norm_weight, norm_bias, weight)
            ctx.eps, ctx.x_dtype, ctx.pieces = eps, x.dtype, pieces
            ctx.bias_dtype = None if bias is None else bias.dtype
            return F.linear(normed, weight.to(dtype), _cast(bias, dtype))

    @staticmethod
    def backward(ctx, gradient):
        kept, norm_weight, norm_bias, weight = ctx.saved_tensors
        pieces = ctx.pieces
        with without_autocast(kept):
            normed, mean, rstd = pieces.norm_again(kept, norm_weight, norm_bias, ctx.eps)
            of_weight = (gradient.T @ normed).to(weight.dtype)
            del normed
            of_bias = None if ctx.bias_dtype is None else pieces.sum_of_rows(gradient, ctx.bias_dtype)
            of_normed = gradient @ weight.to(kept.dtype)
            of_x, *of_norm = pieces.norm_backward(of_normed, kept, mean, rstd, norm_weight, norm_bias, ctx.x_dtype)
        return of_x, *of_norm, of_weight, of_bias, None, None, None


class _ActivationLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, factor, activation, dtype, pieces):
        with without_autocast(x):
            kept = x.to(dtype)
            ctx.save_for_backward(kept, weight, bias, factor)
            ctx.activation, ctx.x_dtype, ctx.pieces = activation, x.dtype, pieces
            active = kept if activation is None else activation.forward(kept)
            return F.linear(active, *(_scaled(one, factor, dtype, pieces) for one in (weight, bias)))

    @staticmethod
    def backward(ctx, gradient):
        kept, weight, bias, factor = ctx.saved_tensors
        pieces = ctx.pieces
        with without_autocast(kept):
            of_active = gradient @ _scaled(weight, factor, kept.dtype, pieces)
            active, of_x = kept, of_active
            if ctx.activation is not None:
                active, of_x = ctx.activation.backward(of_active, kept)
            of_weight = gradient.T @ active
            of_bias = None if bias is None else pieces.sum_of_rows(gradient, bias.dtype)
            of_factor = None
            if factor is None:
                of_weight = of_weight.to(weight.dtype)
            else:
                of_weight, of_factor = pieces.scaled_backward(of_weight, weight.detach(), factor.detach())
                if bias is not None:
                    of_bias, of_factor = of_bias * factor, torch.addcmul(of_factor, of_bias, bias)
        return of_x.to(ctx.x_dtype), of_weight, of_bias, of_factor, None, None, None


def _scaled(weight: Tensor | None, factor: Tensor | None, dtype: torch.dtype, pieces: Pieces) -> Tensor | None:
    if weight is None or factor is None:
        return _cast(weight, dtype)
    return pieces.scaled(weight.detach(), factor.detach(), dtype)
