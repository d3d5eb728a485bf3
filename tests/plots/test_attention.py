"""The plotted attention is the attention that the model uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinov2_custom.models.vision_transformer import vit_micro
from dinov2_custom.plots.attention import class_attention, overlay


@pytest.mark.parametrize("registers, chunks", [(0, 0), (3, 2)])
def test_weights_give_the_blocks_own_output(registers, chunks):
    options = {"num_register_tokens": registers, "block_chunks": chunks, "init_values": 1.0}
    backbone = vit_micro(patch_size=8, img_size=32, **options).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for value in backbone.parameters():
        value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    images = torch.randn(2, 3, 24, 40, generator=generator)
    weights = class_attention(backbone, images)
    assert weights.shape == (2, 2, 3, 5) and (weights > 0).all() and (weights.sum(dim=(2, 3)) < 1).all()

    seen = {}
    last = backbone.all_blocks()[-1]
    last.norm1.register_forward_hook(lambda module, args, out: seen.update(normed=out))
    last.attn.proj.register_forward_pre_hook(lambda module, args: seen.update(mixed=args[0]))
    backbone.forward_features(images)
    normed = seen["normed"].reshape(2, -1, 128)
    value = last.attn.qkv(normed)[..., 256:].view(2, -1, 2, 64)
    first_patch = 1 + registers
    # values that are zero outside the patches leave the patches' share of the class token's output
    from_patches = torch.einsum("bhn,bnhd->bhd", weights.flatten(2), value[:, first_patch:])
    scores = last.attn.qkv(normed).view(2, -1, 3, 2, 64)
    rest = torch.einsum("bhd,bnhd->bhn", scores[:, 0, 0], scores[:, :, 1]).mul(64**-0.5).softmax(-1)[..., :first_patch]
    from_others = torch.einsum("bhn,bnhd->bhd", rest, value[:, :first_patch])
    mixed = seen["mixed"].reshape(2, -1, 128)[:, 0].view(2, 2, 64)
    torch.testing.assert_close(from_patches + from_others, mixed, rtol=1e-4, atol=1e-5)


def test_overlay_is_brightest_where_the_weight_is():
    picture = np.full((40, 60, 3), 128, np.uint8)
    weights = np.zeros((4, 6))
    weights[1, 4] = 1
    drawn = overlay(picture, weights)
    assert drawn.shape == picture.shape and drawn.dtype == np.uint8
    row, column = np.unravel_index(drawn.sum(axis=2).argmax(), (40, 60))
    assert row // 10 == 1 and column // 10 == 4
    assert overlay(picture, np.ones((4, 6))).std(axis=(0, 1)).max() == 0
