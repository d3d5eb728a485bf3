"""Pure tensor functions between the matrix products of lean layers, each of which a compiler may turn into one pass
over memory.

Autograd differentiates nothing here: backward passes are pieces too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def take_rows(x: Tensor, rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x[rows], times ``scale`` (T, 1), in ``dtype``."""
    taken = x.index_select(0, rows)
    return (taken if scale is None else taken * scale).to(dtype)


def add_rows_(x: Tensor, rows: Tensor, addend: Tensor, scale: Tensor | None) -> None:
    """Add ``addend``, times ``scale`` (T, 1), to the rows of ``x``, none of which may be named twice."""
    x.index_add_(0, rows, (addend if scale is None else addend * scale).to(x.dtype))


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return the layer norm of (T, D)."""
    return F.layer_norm(x, x.shape[-1:], *_as_kernels_want(x, weight, bias), eps)


def cast_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x cast to ``dtype``, and its norm."""
    cast = x.to(dtype)
    return cast, norm(cast, weight, bias, eps)


def norm_again(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm, and the means and inverse deviations that its backward pass needs."""
    return torch.native_layer_norm(x, x.shape[-1:], *_as_kernels_want(x, weight, bias), eps)


def norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, in ``dtype``, of weight and of bias."""
    of_x, of_weight, of_bias = aten.native_layer_norm_backward(
        gradient, x, x.shape[-1:], mean, rstd, *_as_kernels_want(x, weight, bias), [True] * 3
    )
    return of_x.to(dtype), of_weight.to(weight.dtype), of_bias.to(bias.dtype)


def _as_kernels_want(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return weights if x.device.type == "cpu" else tuple(one.to(x.dtype) for one in weights)  # CPU kernels accept any


def sum_of_rows(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of (T, D) over rows, summed in float32: the gradient of a bias."""
    return gradient.sum(dim=0, dtype=torch.float32).to(dtype)


def scaled(weight: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (D', D) weights whose rows, or a (D',) bias whose elements, are multiplied by those of ``factor``."""
    return (weight * (factor[:, None] if weight.dim() == 2 else factor)).to(dtype)


def scaled_backward(of_scaled: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and of factor."""
    return of_scaled * factor[:, None], (of_scaled * weight).sum(dim=1)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """Return GELU(x), exact ("none") or approximated by "tanh".

    Source: Hendrycks & Gimpel 2016, section 2.
    """
    return F.gelu(x, approximate=approximate)


def gelu_backward_(gradient: Tensor, x: Tensor, approximate: str) -> Tensor:
    """Return GELU(x), recomputed; turn ``gradient`` of it into that of x, in place."""
    active = F.gelu(x, approximate=approximate)
    aten.gelu_backward.grad_input(gradient, x, approximate=approximate, grad_input=gradient)
    return active


def gated(gate_and_value: Tensor) -> Tensor:
    """Return silu(gate) * value of the two halves of the last dimension (Shazeer 2020, eq. 6)."""
    gate, value = gate_and_value.chunk(2, dim=-1)
    return F.silu(gate) * value


def gated_backward(gradient: Tensor, gate_and_value: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`gated` recomputed, and the gradient of ``gate_and_value``."""
    gate, value = gate_and_value.chunk(2, dim=-1)
    open_ = F.silu(gate)
    return open_ * value, torch.cat((aten.silu_backward(gradient * value, gate), gradient * open_), dim=-1)


@dataclass(frozen=True)
class Pieces:
    """The functions of this file that lean layers call: eager, or :meth:`compiled`."""

    take_rows: Callable = take_rows
    add_rows_: Callable = add_rows_
    norm: Callable = norm
    cast_norm: Callable = cast_norm
    norm_again: Callable = norm_again
    norm_backward: Callable = norm_backward
    sum_of_rows: Callable = sum_of_rows
    scaled: Callable = scaled
    scaled_backward: Callable = scaled_backward
    gelu: Callable = gelu
    gelu_backward_: Callable = gelu_backward_
    gated: Callable = gated
    gated_backward: Callable = gated_backward

    def compiled(self, compiler: Callable[[Callable], Callable]) -> Pieces:
        """Return these pieces, each compiled by ``compiler``."""
        return Pieces(**{one.name: compiler(getattr(self, one.name)) for one in fields(self)})


EAGER = Pieces()
