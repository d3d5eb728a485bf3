"""Run a block as in training: called as a module, or computed from its weights on packed tokens."""

from dinov2_custom.layers.block import call_block, of_tensor
from dinov2_custom.layers.drop_path import to_subsets
from dinov2_custom.layers.pieces import EAGER
from dinov2_custom.layers.segments import pack, unpack


def run(block, crops, lean, generator=None, recompute="none", pieces=EAGER):
    """Return the block's results for a list of (B, N, D)."""
    draws = block.draw([len(x) for x in crops], generator)
    if not lean:
        return [call_block(block, x, of_tensor(draws, index), recompute) for index, x in enumerate(crops)]
    x_TD, segments = pack(crops)
    subsets = to_subsets(draws, segments, x_TD.device)
    return unpack(block.forward_packed(x_TD, subsets, recompute=recompute, pieces=pieces), segments)
