"""Attention maps of the class token in the last block."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2_custom.models.vision_transformer import DinoVisionTransformer

_LOW, _HIGH = np.array([26, 16, 64]), np.array([255, 236, 120])  # dark blue to yellow


@torch.inference_mode()
def class_attention(backbone: DinoVisionTransformer, images: Tensor) -> Tensor:
    """Return the class token's attention to each patch in the last block, float32 (B, heads, rows, columns).

    The attention to itself and to registers is excluded, so the sum over patches is below 1.

    Args:
        images: (B, C, H, W) normalised, sides multiples of the patch size.
    """
    *blocks, last = backbone.all_blocks()
    tokens = backbone.prepare_tokens_with_masks(images)
    for block in blocks:
        tokens = block(tokens)
    batch, length, dim = tokens.shape
    heads = last.attn.num_heads
    qkv = last.attn.qkv(last.norm1(tokens)).float().view(batch, length, 3, heads, dim // heads)
    query, key = qkv[:, 0, 0], qkv[:, :, 1]
    weights = (torch.einsum("bhd,bnhd->bhn", query, key) * last.attn.scale).softmax(dim=-1)
    rows, columns = (side // backbone.patch_size for side in images.shape[-2:])
    return weights[..., 1 + backbone.num_register_tokens :].reshape(batch, heads, rows, columns)


def overlay(picture: np.ndarray, weights: np.ndarray, share: float = 0.65) -> np.ndarray:
    """Colour ``picture`` (uint8 (h, w, 3)) by ``weights`` (rows, columns), from least to most: uint8 (h, w, 3)."""
    scaled = (weights - weights.min()) / max(float(np.ptp(weights)), 1e-12)
    height, width = picture.shape[:2]
    mask = Image.fromarray((scaled * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    strength = np.asarray(mask, dtype=np.float32)[..., None] / 255
    colours = _LOW + (_HIGH - _LOW) * strength
    return ((1 - share) * picture + share * colours).clip(0, 255).astype(np.uint8)
