"""Multi-head self-attention. Kernels live in ``backend.py``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_custom.layers import backend as kernels


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
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        return self.proj_drop(self.proj(self._attend(self.qkv(x))))

    def _attend(self, qkv: Tensor) -> Tensor:
        """Map queries, keys and values (B, N, 3 D) to (B, N, D)."""
        B, N, E = qkv.shape
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, E // (3 * self.num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = kernels.attention(q, k, v, backend=self.backend, dropout_p=dropout_p)
        return out.transpose(1, 2).reshape(B, N, E // 3)


class MemEffAttention(Attention):
    """Upstream's name for the attention that may use a fused kernel; here every :class:`Attention` does."""

    def forward(self, x: Tensor, attn_bias=None) -> Tensor:
        """Map (B, N, D) to (B, N, D), or (1, T, D) whose sequences ``attn_bias`` (``nested.PackedSequences``) tells."""
        if attn_bias is None:
            return super().forward(x)
        attended = [self._attend(qkv).flatten(0, 1) for qkv in attn_bias.split(self.qkv(x))]
        return self.proj_drop(self.proj(torch.cat(attended)[None]))
