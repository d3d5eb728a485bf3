"""Multi-head self-attention. ``backend.py`` chooses the kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_custom.layers import backend as kernels

__getattr__ = kernels.xformers_flag  # XFORMERS_AVAILABLE and XFORMERS_ENABLED, upstream's names


class Attention(nn.Module):
    """Attend within each sequence; one linear layer gives q, k and v.

    ``qkv`` rows are laid out (3, heads, head_dim), as in the released weights.
    """

    backend = "auto"  # one of kernels.BACKENDS

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
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def init_weights(
        self, init_attn_std: float | None = None, init_proj_std: float | None = None, factor: float = 1.0
    ) -> None:
        """Draw weights from normal distributions of std 1/sqrt(dim), times ``factor`` for ``proj``; zero the biases.

        A backbone is initialised by ``init_weights_vit_timm`` instead; this serves users' text towers, as in upstream.
        """
        init_attn_std = init_attn_std or self.dim**-0.5
        nn.init.normal_(self.qkv.weight, std=init_attn_std)
        nn.init.normal_(self.proj.weight, std=init_proj_std or init_attn_std * factor)
        for bias in (self.qkv.bias, self.proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        """Map (B, N, D) to (B, N, D); ``is_causal``: each token attends to itself and those before it."""
        return self.proj_drop(self.proj(self._attend(self.qkv(x), is_causal)))

    def _attend(self, qkv: Tensor, is_causal: bool = False) -> Tensor:
        """Map queries, keys and values (B, N, 3 D) to (B, N, D)."""
        B, N, E = qkv.shape
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, E // (3 * self.num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = kernels.attention(q, k, v, backend=self.backend, dropout_p=dropout_p, is_causal=is_causal)
        return out.transpose(1, 2).reshape(B, N, E // 3)


class MemEffAttention(Attention):
    """Upstream's name for the attention that may use a fused kernel; here every :class:`Attention` does."""

    def forward(self, x: Tensor, attn_bias=None) -> Tensor:
        """Map (B, N, D) to (B, N, D), or (1, T, D) with sequences as in ``attn_bias`` (``nested.PackedSequences``)."""
        if attn_bias is None:
            return super().forward(x)
        attended = [self._attend(qkv).flatten(0, 1) for qkv in attn_bias.split(self.qkv(x))]
        return self.proj_drop(self.proj(torch.cat(attended)[None]))
