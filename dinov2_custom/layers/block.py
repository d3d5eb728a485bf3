"""Transformer blocks on packed tokens: crops of every size go through one pass.

Token-wise work (norms, linear layers, FFN) runs on the (T, D) concatenation of all crops; attention runs a segment.
Read :meth:`Block.forward_packed` first; how a branch is added is in ``residual``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2_custom.layers.attention import Attention, MemEffAttention, Segments, split_segments
from dinov2_custom.layers.backend import xformers_flag
from dinov2_custom.layers.drop_path import Draw, DropPath, Subset, draw_kept, to_subsets
from dinov2_custom.layers.layer_scale import LayerScale
from dinov2_custom.layers.lean import compute_dtype, times
from dinov2_custom.layers.mlp import Mlp
from dinov2_custom.layers.nested import (
    CausalAttentionBlock,
    add_residual,
    drop_add_residual_stochastic_depth,
    drop_add_residual_stochastic_depth_list,
    get_attn_bias_and_cat,
    get_branges_scales,
)
from dinov2_custom.layers.pieces import EAGER
from dinov2_custom.layers.residual import Owned, add_residual_subset

__getattr__ = xformers_flag  # XFORMERS_AVAILABLE and XFORMERS_ENABLED, upstream's names


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), each with stochastic depth in training.

    Args:
        init_values: start of the two LayerScales; None or 0 for none.
        drop_path: share of samples whose branch is skipped. A single tensor with a share of at most 0.1 uses the
            sample-zeroing form instead, as upstream does.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | Tensor | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., nn.Module] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=drop
        )
        self.ls1 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(
            in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2 = LayerScale(dim, init_values=init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.sample_drop_ratio = drop_path
        self.recompute = "none"  # or "selective": the FFN, or "full": everything, once more in the backward pass
        # Hand-written backward passes that keep less; the inner modules are then not called, nor are their hooks.
        self.lean = False
        self.pieces = EAGER  # of lean branches; or compiled ones

    def attention_residual(self, x_TD: Tensor, segments: Segments, scale: float = 1.0) -> Tensor:
        if self.lean:
            options = self.norm1, getattr(self.ls1, "gamma", None), scale, self.pieces
            return self.attn.forward_lean(x_TD, segments, *options)
        return times(self.plain_attention(x_TD, segments), scale)

    def plain_attention(self, x_TD: Tensor, segments: Segments) -> Tensor:
        return self.ls1(self.attn.forward_packed(self.norm1(x_TD), segments))

    def ffn_residual(self, x_TD: Tensor, segments: Segments, scale: float = 1.0) -> Tensor:
        if self.lean:
            return self.mlp.forward_lean(x_TD, self.norm2, getattr(self.ls2, "gamma", None), scale, self.pieces)
        return times(self.plain_ffn(x_TD, segments), scale)

    def plain_ffn(self, x_TD: Tensor, segments: Segments) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x_TD)))

    def can_be_lean(self) -> bool:
        """Return whether ``lean`` may be set: the modules are this project's, without dropout."""
        dropout = any(module.p > 0 for module in self.modules() if isinstance(module, nn.Dropout))
        norms = type(self.norm1) is type(self.norm2) is nn.LayerNorm
        return norms and not dropout and all(hasattr(part, "forward_lean") for part in (self.attn, self.mlp))

    def draw(self, num_sequences: Sequence[int], generator: torch.Generator | None) -> list[Draw]:
        """Draw what the two branches, attention and FFN, are computed for, in tensors of ``num_sequences``."""
        ratio = self.sample_drop_ratio if self.training else 0.0
        return [draw_kept(num_sequences, ratio, generator) for _ in range(2)]

    def forward_packed(
        self,
        x_TD: Tensor,
        segments: Segments,
        subsets: Sequence[Subset] | None = None,
        owned: Owned = Owned(),  # noqa: B008 - immutable
    ) -> Tensor:
        """Run the block on packed tokens.

        Args:
            x_TD: (T, D), the crops of every segment end to end.
            segments: [(num_sequences, length), ...]; their products sum to T.
            subsets: of the attention branch and of the FFN branch; None: everything.
            owned: whether x and the gradient of the result may be overwritten.
        """
        subsets = subsets or [Subset(None, segments, 1.0)] * 2
        if self.recompute == "full" and torch.is_grad_enabled():
            owned = owned._replace(x=False)  # it is what is kept
            return checkpoint(
                self._forward_subsets, x_TD, subsets, owned, use_reentrant=False, preserve_rng_state=False
            )
        return self._forward_subsets(x_TD, subsets, owned)

    def _forward_subsets(self, x_TD: Tensor, subsets: Sequence[Subset], owned: Owned) -> Tensor:
        attention, ffn = subsets
        again = self.recompute == "selective" and torch.is_grad_enabled()
        # lean branches want no other precision, and selective recomputation keeps the rows as they are taken
        options = (compute_dtype(x_TD) if self.lean or again else None), self.pieces if self.lean else EAGER
        # between the two branches nobody else sees x, nor its gradient
        x_TD = add_residual_subset(
            x_TD, self.attention_residual, attention, Owned(owned.x, ffn.rows is not None), *options
        )
        last = Owned(attention.rows is not None, owned.gradient)
        return add_residual_subset(x_TD, self._ffn_again if again else self.ffn_residual, ffn, last, *options)

    def _ffn_again(self, x_TD: Tensor, segments: Segments, scale: float) -> Tensor:
        x_TD = x_TD.to(compute_dtype(x_TD))  # this is what is kept
        return checkpoint(self.ffn_residual, x_TD, segments, scale, use_reentrant=False, preserve_rng_state=False)

    def forward(
        self, x_or_x_list: Tensor | list[Tensor], generator: torch.Generator | None = None
    ) -> Tensor | list[Tensor]:
        """Map (B, N, D), or a list of such tensors of different B and N, to the same shapes."""
        if isinstance(x_or_x_list, Tensor):
            x_BND = x_or_x_list
            segments = [x_BND.shape[:2]]
            if self.training and 0.0 < self.sample_drop_ratio <= 0.1:
                return self._forward_zeroing(x_BND, segments)
            return self._forward_drawn(x_BND.flatten(0, 1), segments, generator).view(x_BND.shape)
        x_TD, segments = pack(x_or_x_list)
        return unpack(self._forward_drawn(x_TD, segments, generator), segments)

    def _forward_drawn(self, x_TD: Tensor, segments: Segments, generator: torch.Generator | None) -> Tensor:
        draws = self.draw([total for total, _ in segments], generator)
        return self.forward_packed(x_TD, segments, to_subsets(draws, segments, x_TD.device))

    def _forward_zeroing(self, x_BND: Tensor, segments: Segments) -> Tensor:
        for residual in (self.attention_residual, self.ffn_residual):
            branch = residual(x_BND.flatten(0, 1), segments).view(x_BND.shape)
            x_BND = x_BND + self.drop_path1(branch)
        return x_BND


class NestedTensorBlock(Block):
    """Upstream's name for the block that accepts a list of tensors; here every :class:`Block` does."""

    def forward_nested(self, x_list: list[Tensor]) -> list[Tensor]:
        """Map a list of (B_i, N_i, D) to the same shapes."""
        return self.forward(x_list)


class BlockChunk(nn.ModuleList):
    """A run of blocks under one module name. Positions before the run hold ``nn.Identity``, so names count globally."""

    def forward(self, x, generator: torch.Generator | None = None):
        for block in self:
            x = block(x, generator) if isinstance(block, Block) else block(x)
        return x


def pack(x_list: list[Tensor]) -> tuple[Tensor, Segments]:
    """Lay (B, N, D) tensors end to end as (T, D) with their segments."""
    flat = [x.reshape(-1, x.shape[-1]) for x in x_list]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)), [(x.shape[0], x.shape[1]) for x in x_list]


def unpack(x_TD: Tensor, segments: Segments) -> list[Tensor]:
    """Cut (T, D) into one (B, N, D) view a segment."""
    parts = split_segments(x_TD, segments)
    return [part.view(*segment, x_TD.shape[-1]) for part, segment in zip(parts, segments, strict=True)]


__all__ = [
    "Attention",
    "Block",
    "BlockChunk",
    "CausalAttentionBlock",
    "DropPath",
    "LayerScale",
    "MemEffAttention",
    "Mlp",
    "NestedTensorBlock",
    "add_residual",
    "add_residual_subset",
    "drop_add_residual_stochastic_depth",
    "drop_add_residual_stochastic_depth_list",
    "get_attn_bias_and_cat",
    "get_branges_scales",
    "pack",
    "unpack",
]
