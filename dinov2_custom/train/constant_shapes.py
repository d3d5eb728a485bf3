"""A batch whose number of masked patches does not change from step to step: padded with rows that weigh nothing.

Where kernels are compiled or memory is kept for the next step, the same shapes again are worth a few rows more. A row
of padding stands for a patch that is there (so its features are finite), has the weight 0 in the loss and is in no
sum over rows of the teacher's. Not in here: those sums (``loss``). Read :func:`pad_patches` first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of rows are multiples of this share of all patches: few different ones, and not many rows too many.
_SHARE = 16


def padded_count(count: int, num_patches: int) -> int:
    """Return the least multiple of a 16th of ``num_patches`` that is not below ``count``, but at most all of them."""
    grain = max(1, num_patches // _SHARE)
    return max(count, min(-(-count // grain) * grain, num_patches))


def pad_patches(images: dict, masked_in_first: int, apart: bool) -> tuple[dict, int]:
    """Return the collated batch with padded masked patches, and how many rows are now the first global crops'.

    There is one row at least, so that no kernel sees none. ``n_masked_patches`` stays the real number, and rows of
    padding are those with ``masks_weight`` 0.

    Args:
        masked_in_first: masked patches of the first global crops.
        apart: first and second global crops are cut apart later: each half is padded, to the same length. Otherwise the
            end is, to the batch's upper bound, which a process that draws its masks alone has the same in every step.
    """
    positions, weights = images["mask_indices_list"], images["masks_weight"]
    num_patches, total = images["collated_masks"].numel(), len(positions)
    if apart:
        half = padded_count(max(1, masked_in_first, total - masked_in_first), num_patches // 2)
        cuts = ((slice(masked_in_first), 0), (slice(masked_in_first, None), num_patches // 2))
        parts = [(positions[rows], weights[rows], half, first_patch) for rows, first_patch in cuts]
    else:
        parts = [(positions, weights, padded_count(max(1, total, images["upperbound"]), num_patches), 0)]
    padded = [_padded(*part) for part in parts]
    positions, weights = (torch.cat(tensors) for tensors in zip(*padded, strict=True))
    return {**images, "mask_indices_list": positions, "masks_weight": weights}, half if apart else masked_in_first


def _padded(positions: Tensor, weights: Tensor, count: int, position: int) -> tuple[Tensor, Tensor]:
    missing = (0, count - len(positions))
    return F.pad(positions, missing, value=position), F.pad(weights, missing)
