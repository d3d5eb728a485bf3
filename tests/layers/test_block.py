import pytest
import torch

from dinov2_custom.layers import NestedTensorBlock, SwiGLUFFNFused
from dinov2_custom.layers.block import BlockChunk
from dinov2_custom.layers.drop_path import draw_kept, num_kept, to_subsets
from tests.layers.both_ways import run


def tokens(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, 32, generator=g) for shape in shapes]


def make_block(**kwargs):
    torch.manual_seed(0)
    return NestedTensorBlock(32, num_heads=4, qkv_bias=True, init_values=0.5, **kwargs)


@pytest.mark.parametrize("ffn", [{}, {"ffn_layer": SwiGLUFFNFused}])
def test_packed_equals_one_tensor_at_a_time(ffn):
    block = make_block(**ffn).eval()
    crops = tokens((2, 17), (5, 5))
    for packed, listed, crop in zip(run(block, crops, lean=True), block(crops), crops, strict=True):
        torch.testing.assert_close(packed, block(crop))
        assert torch.equal(listed, block(crop))


@pytest.mark.parametrize("way", ["lean", "called", "listed"])
def test_drop_path_computes_the_drawn_samples_and_leaves_the_rest(way):
    block = make_block(drop_path=0.4).train()
    crops = tokens((5, 3), (10, 2))
    if way == "listed":
        torch.manual_seed(3)
        out = block(crops)
    else:
        out = run(block, crops, way == "lean", torch.Generator().manual_seed(3))

    draws = torch.Generator().manual_seed(3)
    expected = [crop.clone() for crop in crops]
    for residual in (block.attn_residual, block.ffn_residual):
        for crop in expected:
            kept = torch.randperm(len(crop), generator=draws)[: num_kept(len(crop), 0.4)]
            sub = crop[kept]
            crop[kept] = sub + residual(sub) * len(crop) / len(kept)
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_same_generator_same_subset_and_expectation_is_kept():
    draws = [draw_kept([64], 0.3, torch.Generator().manual_seed(1)) for _ in range(2)]
    subset, again = to_subsets(draws, [(64, 2)], torch.device("cpu"))
    assert torch.equal(subset.rows, again.rows)
    assert subset.segments == [(44, 2)] and len(subset.rows) == 88
    assert subset.scale == pytest.approx(64 / 44)


def test_small_rates_on_one_tensor_zero_whole_samples():
    block = make_block(drop_path=0.1).train()
    (x,) = tokens((64, 3))
    torch.manual_seed(0)
    changed = (block(x) != x).flatten(1).any(dim=1)
    assert 40 < changed.sum() <= 64


def test_one_sample_is_always_kept():
    assert num_kept(1, 0.9) == 1
    assert num_kept(3, 0.99) == 1


def test_chunk_runs_its_blocks_and_skips_padding():
    block = make_block().eval()
    (x,) = tokens((2, 4))
    torch.testing.assert_close(BlockChunk([torch.nn.Identity(), block])(x), block(x))


def test_input_is_not_changed_in_place():
    block = make_block(drop_path=0.4).train()
    crops = tokens((4, 3))
    before = crops[0].clone()
    for lean in (True, False):
        run(block, crops, lean, torch.Generator())
    assert torch.equal(crops[0], before)
