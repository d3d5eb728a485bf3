from __future__ import annotations

import pytest
import torch

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.layers import LayerScale, MemEffAttention
from dinov2_custom.layers.block import (
    CausalAttentionBlock,
    add_residual,
    drop_add_residual_stochastic_depth,
    drop_add_residual_stochastic_depth_list,
    get_attn_bias_and_cat,
    get_branges_scales,
)


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def test_packed_attention_is_attention_of_each_sequence():
    torch.manual_seed(0)
    attention = MemEffAttention(16, num_heads=2).eval()
    crops = tensors((3, 5, 16), (2, 9, 16))
    packing, packed = get_attn_bias_and_cat(crops)
    assert packed.shape == (1, 33, 16)
    for got, crop in zip(packing.split(attention(packed, attn_bias=packing)), crops, strict=True):
        torch.testing.assert_close(got, attention(crop))


def test_chosen_samples_are_packed():
    crops, branges = tensors((3, 2, 4), (2, 3, 4)), [torch.tensor([2, 0]), torch.tensor([1])]
    packing, packed = get_attn_bias_and_cat(crops, branges)
    parts = packing.split(packed)
    assert torch.equal(parts[0], crops[0][[2, 0]]) and torch.equal(parts[1], crops[1][[1]])


def test_without_drop_it_is_a_plain_residual():
    (x,) = tensors((4, 3, 8))
    torch.testing.assert_close(drop_add_residual_stochastic_depth(x, torch.sin), x + torch.sin(x))
    crops, scale = tensors((4, 3, 8), (2, 5, 8)), torch.linspace(0, 1, 8)
    got = drop_add_residual_stochastic_depth_list(crops, lambda t, attn_bias: torch.sin(t), 0.0, scale)
    for one, crop in zip(got, crops, strict=True):
        torch.testing.assert_close(one, crop + torch.sin(crop) * scale)


@pytest.mark.parametrize("listed", [False, True])
def test_dropped_samples_are_unchanged_and_the_others_are_scaled(listed):
    torch.manual_seed(0)
    (x,) = tensors((10, 3, 8))
    if listed:
        (got,) = drop_add_residual_stochastic_depth_list([x], lambda t, attn_bias: torch.ones_like(t), 0.3)
    else:
        got = drop_add_residual_stochastic_depth(x, torch.ones_like, 0.3)
    added = (got - x).mean(dim=(1, 2))
    assert sorted(added.round(decimals=4).tolist()) == pytest.approx([0] * 3 + [10 / 7] * 7, abs=1e-4)
    brange, scale = get_branges_scales(x, 0.3)
    assert len(set(brange.tolist())) == 7 and scale == 10 / 7


def test_residual_keeps_the_type_of_x():
    (x,) = tensors((3, 2, 4))
    got = add_residual(x, torch.tensor([1]), torch.ones(1, 2, 4, dtype=torch.bfloat16), 2.0, LayerScale(4, 0.5).gamma)
    torch.testing.assert_close(got[1], x[1] + 1)
    assert got.dtype == x.dtype and torch.equal(got[0], x[0])


def test_text_tower_raises_an_error():
    with pytest.raises(DINOv2Error, match="dino.txt"):
        CausalAttentionBlock(8, 2)
