"""Stack and initialise blocks: FFN by name, drop-path rates, chunks, weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.init import trunc_normal_

from dinov2_custom.layers import Mlp, SwiGLUFFNFused
from dinov2_custom.layers.block import BlockChunk


def _identity_ffn(**_) -> nn.Module:
    return nn.Identity()


FFN_LAYERS = {"mlp": Mlp, "swiglu": SwiGLUFFNFused, "swiglufused": SwiGLUFFNFused, "identity": _identity_ffn}


def drop_path_rates(depth: int, rate: float, uniform: bool) -> list[float]:
    """Return each block's drop ratio: ``rate`` everywhere, or rising linearly from 0 to ``rate``."""
    # computed in torch's float32 steps: a last-bit difference can change how many samples a block keeps
    return [rate] * depth if uniform else torch.linspace(0, rate, depth, device="cpu").tolist()


def chunk_blocks(blocks: list[nn.Module], num_chunks: int) -> list[BlockChunk]:
    """Group blocks into chunks of depth // num_chunks, each padded at the front so that names use global indices."""
    size = len(blocks) // num_chunks
    return [
        BlockChunk([nn.Identity() for _ in range(start)] + blocks[start : start + size])
        for start in range(0, len(blocks), size)
    ]


def init_weights_vit_timm(module: nn.Module, name: str = "") -> None:
    """Draw a linear layer's weight from a normal(0, 0.02) truncated at +-2, and zero its bias."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def named_apply(
    fn: Callable[..., None], module: nn.Module, name: str = "", depth_first: bool = True, include_root: bool = False
) -> nn.Module:
    """Call ``fn(module=..., name=...)`` on every submodule, children before parents when ``depth_first``."""
    named = [(full, sub) for full, sub in module.named_modules(prefix=name) if include_root or sub is not module]
    for full, sub in reversed(named) if depth_first else named:
        fn(module=sub, name=full)
    return module
