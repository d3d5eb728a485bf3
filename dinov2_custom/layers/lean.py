"""Linear layers that keep for their backward pass the smallest tensor it can be computed from.

A norm or an activation in front of a linear layer is computed twice instead of kept, and the LayerScale behind it needs
no tensor at all. What is kept is half of what autograd would keep. Same formulas; products in the precision of the
autocast region. Read :func:`norm_linear` and :func:`activation_linear`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of products with ``x`` here: the autocast region's, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """Return linear(norm(x)) of (T, D), keeping x alone, in the precision of the product."""
    return _NormLinear.apply(x, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps, compute_dtype(x))


def activation_linear(
    x: Tensor, activation: Callable[[Tensor], Tensor] | None, linear: nn.Linear, gamma: Tensor | None = None
) -> Tensor:
    """Return gamma * linear(activation(x)) of (T, D'), keeping x alone; ``activation`` has no parameters, None is none.

    Source: d / d gamma = rowsum(dW * W) + db * b, where dW and db are the layer's gradients before scaling.
    """
    dtype = compute_dtype(x)
    if gamma is not None and dtype == torch.float16:  # weights times 1e-5 are below its smallest number
        return _ActivationLinear.apply(x, linear.weight, linear.bias, None, activation, dtype) * gamma
    return _ActivationLinear.apply(x, linear.weight, linear.bias, gamma, activation, dtype)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *_as_kernels_want(x, weight, bias), eps)


def _as_kernels_want(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return weights if x.device.type == "cpu" else tuple(one.to(x.dtype) for one in weights)  # a CPU's take any


def _norm_again(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Callable]:
    """Return what :func:`_norm` does, and the function from its gradient to those of x, weight and bias.

    Without autograd inside autograd, which takes the host longer than the kernels.
    """
    size, weights = x.shape[-1:], _as_kernels_want(x, weight, bias)
    normed, mean, rstd = torch.native_layer_norm(x, size, *weights, eps)

    def backward(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_x, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            gradient, x, size, mean, rstd, *weights, [True] * 3
        )
        return of_x, of_weight.to(weight.dtype), of_bias.to(bias.dtype)

    return normed, backward


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _without_autocast(x: Tensor):
    return torch.autocast(x.device.type, enabled=False)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, eps, dtype):
        with _without_autocast(x):
            kept = x.to(dtype)
            ctx.save_for_backward(kept, norm_weight, norm_bias, weight)
            ctx.eps, ctx.has_bias, ctx.x_dtype = eps, bias is not None, x.dtype
            return F.linear(_norm(kept, norm_weight, norm_bias, eps), weight.to(dtype), _cast(bias, dtype))

    @staticmethod
    def backward(ctx, gradient):
        kept, norm_weight, norm_bias, weight = ctx.saved_tensors
        with _without_autocast(kept):
            normed, backward = _norm_again(kept, norm_weight, norm_bias, ctx.eps)
            of_weight = (gradient.T @ normed).to(weight.dtype)
            del normed
            of_bias = gradient.sum(dim=0, dtype=torch.float32).to(weight.dtype) if ctx.has_bias else None
            of_x, *of_norm = backward(gradient @ weight.to(kept.dtype))
        return of_x.to(ctx.x_dtype), *of_norm, of_weight, of_bias, None, None


class _ActivationLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gamma, activation, dtype):
        with _without_autocast(x):
            kept = x.to(dtype)
            ctx.save_for_backward(kept, weight, bias, gamma)
            ctx.activation, ctx.x_dtype = activation, x.dtype
            scaled_bias = bias if gamma is None or bias is None else bias * gamma
            active = kept if activation is None else activation(kept)
            return F.linear(active, _scaled(weight, gamma).to(dtype), _cast(scaled_bias, dtype))

    @staticmethod
    def backward(ctx, gradient):
        kept, weight, bias, gamma = ctx.saved_tensors
        of_active = gradient @ _scaled(weight, gamma).to(kept.dtype)
        if ctx.activation is None:
            active, of_x = kept, of_active
        else:
            with torch.enable_grad(), _without_autocast(kept):
                leaf = kept.detach().requires_grad_()
                active = ctx.activation(leaf)
            (of_x,) = torch.autograd.grad(active, leaf, of_active)
        of_weight = (gradient.T @ active.detach()).to(weight.dtype)
        of_bias = None if bias is None else gradient.sum(dim=0, dtype=torch.float32).to(bias.dtype)
        of_gamma = None
        if gamma is not None:
            of_gamma = (of_weight * weight).sum(dim=1)
            of_weight = of_weight * gamma[:, None]
            if bias is not None:
                of_gamma, of_bias = of_gamma + of_bias * bias, of_bias * gamma
        return of_x.to(ctx.x_dtype), of_weight, of_bias, of_gamma, None, None


def _scaled(weight: Tensor, gamma: Tensor | None) -> Tensor:
    return weight if gamma is None else weight * gamma[:, None]
