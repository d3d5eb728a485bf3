"""Multi-head self-attention over packed sequences. Kernels live in ``backend.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov2_custom.layers.backend import attention, xformers_flag
from dinov2_custom.layers.lean import activation_linear, norm_linear
from dinov2_custom.layers.pieces import Pieces

__getattr__ = xformers_flag  # XFORMERS_AVAILABLE and XFORMERS_ENABLED, upstream's names

# How tokens of several crops lie in one (T, D) tensor: [(number of sequences, tokens a sequence), ...]
Segments = list[tuple[int, int]]


class Attention(nn.Module):
    """Attend within each sequence; one linear layer gives q, k and v.

    ``qkv`` rows are laid out (3, heads, head_dim), as in the released weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.backend = "auto"

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        num_sequences, length, dim = x_BND.shape
        return self.forward_packed(x_BND.reshape(-1, dim), [(num_sequences, length)]).view(x_BND.shape)

    def forward_packed(self, x_TD: Tensor, segments: Segments) -> Tensor:
        """Map packed tokens (T, D) to (T, D); the linear layers run once, attention once a segment."""
        return self.proj_drop(self.proj(self.attend(self.qkv(x_TD), segments)))

    def forward_lean(
        self, x_TD: Tensor, segments: Segments, norm: nn.LayerNorm, gamma: Tensor | None, scale: float, pieces: Pieces
    ) -> Tensor:
        """Return scale * gamma * forward_packed(norm(x)), keeping less for the backward pass; see ``lean``."""
        attended = self.attend(norm_linear(x_TD, norm, self.qkv, pieces), segments, _SplitHeads.apply)
        return activation_linear(attended, None, self.proj, gamma, scale, pieces)

    def attend(self, qkv_TE: Tensor, segments: Segments, split: Callable | None = None) -> Tensor:
        """Map (T, 3 D) queries, keys and values to (T, D), each sequence by itself; ``split``: :func:`split_heads`."""
        dropout_p = self.attn_drop.p if self.training else 0.0
        parts = (split or split_heads)(qkv_TE, segments, self.num_heads)
        outputs = []
        for q, k, v in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            out = attention(q, k, v, backend=self.backend, dropout_p=dropout_p)
            outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class MemEffAttention(Attention):
    """Upstream's name for the attention that may use a fused kernel; here every :class:`Attention` does."""

    def forward(self, x: Tensor, attn_bias=None) -> Tensor:
        """Map (B, N, D) to (B, N, D), or (1, T, D) whose sequences ``attn_bias`` (``nested.PackedSequences``) tells."""
        return super().forward(x) if attn_bias is None else self.forward_packed(x[0], attn_bias.segments)[None]


def split_heads(qkv_TE: Tensor, segments: Segments, num_heads: int) -> tuple[Tensor, ...]:
    """Return views (num_sequences, heads, length, head_dim) of packed (T, 3 D): q, k and v of each segment in turn."""
    head_dim = qkv_TE.shape[-1] // (3 * num_heads)
    parts = []
    for segment, qkv in zip(segments, split_segments(qkv_TE, segments), strict=True):
        parts += qkv.view(*segment, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return tuple(parts)


class _SplitHeads(torch.autograd.Function):
    """:func:`split_heads`, whose backward writes each gradient to its place: autograd's own passes over them thrice."""

    @staticmethod
    def forward(ctx, qkv_TE: Tensor, segments: Segments, num_heads: int) -> tuple[Tensor, ...]:
        ctx.shape, ctx.segments, ctx.num_heads = qkv_TE.shape, segments, num_heads
        return split_heads(qkv_TE, segments, num_heads)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        of_qkv = gradients[0].new_empty(ctx.shape)
        for place, gradient in zip(split_heads(of_qkv, ctx.segments, ctx.num_heads), gradients, strict=True):
            place.copy_(gradient)
        return of_qkv, None, None


def split_segments(x_TD: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    """Cut packed tokens into one (num_sequences * length, D) view a segment."""
    return x_TD.split([num_sequences * length for num_sequences, length in segments])
