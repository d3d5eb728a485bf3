"""Transformer blocks with upstream's interface: each module is called, on (B, N, D).

Training computes a block from its weights instead if all its modules are as they were built: see ``packed`` and
``unmodified``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.layers.attention import Attention
from dinov2_custom.layers.attention import MemEffAttention as MemEffAttention  # upstream has it here too
from dinov2_custom.layers.backend import xformers_flag
from dinov2_custom.layers.drop_path import Draw, DropPath, Kept, draw_kept, num_kept
from dinov2_custom.layers.layer_scale import LayerScale
from dinov2_custom.layers.mlp import Mlp
from dinov2_custom.layers.packed import forward_packed
from dinov2_custom.layers.segments import Segments, split_segments
from dinov2_custom.utils.transfer import to_device

__getattr__ = xformers_flag  # XFORMERS_AVAILABLE and XFORMERS_ENABLED, upstream's names


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), each with stochastic depth in training.

    Args:
        init_values: initial value of the two LayerScales; None or 0 for none.
        drop_path: fraction of samples whose branch is skipped.
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

    def attn_residual(self, x: Tensor) -> Tensor:
        return self.ls1(self.attn(self.norm1(x)))

    def ffn_residual(self, x: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def draw(self, num_sequences: Sequence[int], generator: torch.Generator | None = None) -> list[Draw]:
        """Draw the samples that the attention and FFN branches are computed for, in tensors of ``num_sequences``."""
        ratio = self.sample_drop_ratio if self.training else 0.0
        return [draw_kept(num_sequences, ratio, generator) for _ in range(2)]

    def forward(self, x: Tensor, draws: Sequence[Kept | None] | None = None, recompute_ffn: bool = False) -> Tensor:
        """Map (B, N, D) to (B, N, D).

        Args:
            draws: the samples that the attention branch and the FFN branch are computed for (None: all), in training.
                Without ``draws`` they come from torch's global CPU generator; a ratio of at most 0.1 zeroes
                samples instead, as upstream does.
            recompute_ffn: recompute the FFN branch in the backward pass instead of saving it.
        """
        if draws is None and self.training and 0.0 < self.sample_drop_ratio <= 0.1:
            x = x + self.drop_path1(self.attn_residual(x))
            return x + self.drop_path1(self.ffn_residual(x))
        # not len(x), which would fix the batch size of an exported graph
        attention, ffn = of_tensor(self.draw([x.shape[0]]), 0) if draws is None else draws
        x = _add_branch(x, self.attn_residual, attention)
        if recompute_ffn and torch.is_grad_enabled():
            return _add_branch(x, partial(checkpoint, self.ffn_residual, use_reentrant=False), ffn)
        return _add_branch(x, self.ffn_residual, ffn)

    def forward_packed(self, *args, **kwargs) -> Tensor:
        """Compute the block from its weights, see :func:`packed.forward_packed`; FSDP2 gathers them around it."""
        return forward_packed(self, *args, **kwargs)


def _add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], kept: Kept | None) -> Tensor:
    if kept is None:
        return x + branch(x)
    sequences = to_device(kept.sequences, x.device)
    return add_residual(x, sequences, branch(x.index_select(0, sequences)), kept.scale)


def of_tensor(draws: Sequence[Draw], index: int) -> list[Kept | None]:
    """Return the part of ``draws``, which cover several tensors, that belongs to one."""
    return [None if draw is None else draw[index] for draw in draws]


class NestedTensorBlock(Block):
    """A block that also takes a list of tensors."""

    def forward_nested(self, x_list: Sequence[Tensor]) -> list[Tensor]:
        """Map a list of (B_i, N_i, D) to the same shapes, one at a time."""
        draws = self.draw([x.shape[0] for x in x_list])
        return [Block.forward(self, x, of_tensor(draws, index)) for index, x in enumerate(x_list)]

    def forward(self, x_or_x_list: Tensor | Sequence[Tensor], **options) -> Tensor | list[Tensor]:
        """Map (B, N, D), or a list of such tensors of different B and N, to the same shapes.

        ``options``: of :meth:`Block.forward`, for a single tensor.
        """
        if isinstance(x_or_x_list, Tensor):
            return super().forward(x_or_x_list, **options)
        return self.forward_nested(x_or_x_list)


class BlockChunk(nn.ModuleList):
    """A run of blocks under one module name. Positions before the run hold ``nn.Identity``, so names count globally."""

    def forward(self, x):
        for block in self:
            x = block(x)
        return x


_FORWARDS = (Block.forward, NestedTensorBlock.forward)  # as defined here; users may replace them


def has_own_forward(block: nn.Module) -> bool:
    """Return whether calling ``block`` runs :meth:`Block.forward` as defined here, regardless of its modules."""
    return (
        isinstance(block, Block)
        and type(block).forward in _FORWARDS
        and "forward" not in vars(block)
        and (Block.forward, NestedTensorBlock.forward) == _FORWARDS
    )


def call_block(block: nn.Module, x: Tensor, draws: Sequence[Kept | None], recompute: str = "none") -> Tensor:
    """Call a block, or the module that replaces it, on (B, N, D) in training.

    A ``forward`` from elsewhere gets x only: it makes its own draws and is recomputed as a whole.

    Args:
        recompute: "none", or what the backward pass recomputes: "selective": the FFN; "full": everything.
    """
    options = {}
    again = recompute != "none" and torch.is_grad_enabled()
    if has_own_forward(block):
        options = {"draws": draws, "recompute_ffn": again and recompute == "selective"}
        again = recompute == "full" and again
    return checkpoint(block, x, use_reentrant=False, **options) if again else block(x, **options)


# Upstream's functions for stochastic depth over single tensors and lists of them, for code that imports them. Only
# add_residual is used here: training packs tokens and draws subsets itself.


class PackedSequences:
    """Row ranges of the sequences in a (1, T, D) tensor; what upstream passes to attention as ``attn_bias``."""

    def __init__(self, segments: Segments) -> None:
        self.segments = segments

    def split(self, packed: Tensor) -> list[Tensor]:
        """Cut (1, T, D) into one (B, N, D) tensor per segment."""
        parts = split_segments(packed[0], self.segments)
        return [part.view(*segment, -1) for part, segment in zip(parts, self.segments, strict=True)]


def get_branges_scales(x: Tensor, sample_drop_ratio: float = 0.0) -> tuple[Tensor, float]:
    """Draw the samples of ``x`` (B, ...) that a branch is computed for; return their indices and B / count."""
    kept = num_kept(len(x), sample_drop_ratio)
    return torch.randperm(len(x), device=x.device)[:kept], len(x) / kept


def add_residual(
    x: Tensor, brange: Tensor, residual: Tensor, residual_scale_factor: float, scaling_vector: Tensor | None = None
) -> Tensor:
    """Return ``x`` with the scaled ``residual`` added to its samples ``brange``; ``scaling_vector`` is a LayerScale."""
    if scaling_vector is not None:
        residual = residual * scaling_vector
    return torch.index_add(x, 0, brange, residual.to(x.dtype), alpha=residual_scale_factor)


def get_attn_bias_and_cat(
    x_list: Sequence[Tensor], branges: Sequence[Tensor] | None = None
) -> tuple[PackedSequences, Tensor]:
    """Concatenate tensors (B_i, N_i, D), or their samples ``branges``; return their layout and (1, T, D)."""
    if branges is not None:
        x_list = [x[brange] for x, brange in zip(x_list, branges, strict=True)]
    packed = torch.cat([x.flatten(0, 1) for x in x_list])
    return PackedSequences([(x.shape[0], x.shape[1]) for x in x_list]), packed[None]


def drop_add_residual_stochastic_depth(
    x: Tensor, residual_func: Callable[[Tensor], Tensor], sample_drop_ratio: float = 0.0
) -> Tensor:
    """Return x + residual_func(x), computed for a random subset of the samples and scaled to the same expectation.

    Source: DINOv2 (Oquab et al. 2023), section 5, "Efficient stochastic depth".
    """
    brange, scale = get_branges_scales(x, sample_drop_ratio)
    return add_residual(x, brange, residual_func(x[brange]), scale)


def drop_add_residual_stochastic_depth_list(
    x_list: Sequence[Tensor],
    residual_func: Callable[..., Tensor],
    sample_drop_ratio: float = 0.0,
    scaling_vector: Tensor | None = None,
) -> list[Tensor]:
    """Apply the same to several tensors (B_i, N_i, D) with one call of ``residual_func((1, T, D), attn_bias=...)``."""
    drawn = [get_branges_scales(x, sample_drop_ratio) for x in x_list]
    packing, packed = get_attn_bias_and_cat(x_list, [brange for brange, _ in drawn])
    residuals = packing.split(residual_func(packed, attn_bias=packing))
    return [
        add_residual(x, brange, residual, scale, scaling_vector)
        for x, (brange, scale), residual in zip(x_list, drawn, residuals, strict=True)
    ]


class CausalAttentionBlock(nn.Module):
    """Placeholder for the block of dino.txt's text tower, which this package does not have."""

    def __init__(self, *args, **kwargs) -> NoReturn:
        raise DINOv2Error(
            "CausalAttentionBlock: expected a block of the image backbones, got that of dino.txt's text tower, which "
            "this project does not have; use NestedTensorBlock, or upstream's package for dino.txt"
        )
