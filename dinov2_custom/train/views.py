"""Group the views that pass through the student together, and cut them from a batch.

The loss is a sum over the student's views, so their gradients may be computed group by group, and only one group's
activations are alive at a time. Where kernels are compiled or memory is kept for the next step, :func:`pad_patches`
gives all batches the same number of masked patches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_custom.layers.drop_path import Draw, restrict

# ``auto`` splits until a group's activations are estimated below this; smaller groups do not justify another pass. On
# a GPU a small pass takes longer to launch than to compute.
_ENOUGH_BYTES = {"cpu": 512 * 2**20, "cuda": 4 * 2**30}
_BYTES_PER_CHANNEL = 20  # saved for the backward pass by a block in 16 bits, per token and channel
# Numbers of rows are multiples of this share of all patches: few distinct shapes, little padding.
_ROWS_SHARE = 16


class ViewGroup(NamedTuple):
    """Global crops ``global_views`` (within 0..1) and local crops ``local_views``."""

    global_views: range
    local_views: range


def num_crop_pairs(num_local_crops: int) -> int:
    """Return the number of crop pairs over which the DINO terms are averaged."""
    return 2 + max(2 * num_local_crops, 1)


def group_views(
    setting: int | str,
    num_local: int,
    tokens_global: int = 1,
    tokens_local: int = 1,
    channels: int = 0,
    device: str = "cpu",
) -> list[ViewGroup]:
    """Return the groups, all views in one or global crops before local ones.

    1: all views together. 2: global crops, local crops. n > 2: each global crop alone, and the local crops in n - 2
    parts (at most one part per crop).

    Args:
        setting: ``train.view_groups``.
        tokens_global: tokens of one global crop over all images; ``tokens_local``: of one local crop.
        channels: width times depth of the backbone, from which ``auto`` estimates memory.
        device: only its type matters; any other than a CPU is treated as a GPU.
    """
    if setting == "auto":
        total = 2 * tokens_global + num_local * tokens_local
        parts_local = min(num_local, -(-num_local * tokens_local // tokens_global))
        sizes = {1: total, 2: max(2 * tokens_global, num_local * tokens_local), 2 + max(parts_local, 1): 0}
        enough = _ENOUGH_BYTES["cpu" if device == "cpu" else "cuda"]
        setting = next(n for n, size in sizes.items() if size * channels * _BYTES_PER_CHANNEL <= enough)
    if setting == 1:
        return [ViewGroup(range(2), range(num_local))]
    groups = [range(2)] if setting == 2 else [range(1), range(1, 2)]
    parts = min(num_local, max(1, setting - 2))
    edges = [num_local * i // max(parts, 1) for i in range(parts + 1)]
    local_groups = [range(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True)]
    nothing = range(0)
    return [*(ViewGroup(views, nothing) for views in groups), *(ViewGroup(nothing, views) for views in local_groups)]


class Views(NamedTuple):
    """The part of a batch of b = ``batch_size`` images that belongs to a group.

    Attributes:
        global_crops: (G*b, 3, H, W), ``masks`` (G*b, N); None without global crops.
        local_crops: (L*b, 3, h, w), or None.
        patches: (M,) positions of the masked patches in G*b*N, ``patch_weights`` (M,), and the rows of the teacher's
                patch targets that correspond to them.
    """

    batch_size: int
    global_crops: Tensor | None
    masks: Tensor | None
    local_crops: Tensor | None
    patches: Tensor
    patch_weights: Tensor
    patch_rows: range


def cut_views(images: dict, group: ViewGroup, masked_in_first: int) -> Views:
    """Cut a collated batch; ``masked_in_first`` is the number of masked patches of the first global crops."""
    batch_size = len(images["collated_global_crops"]) // 2
    num_patches = images["collated_masks"].shape[1]
    edges = (0, masked_in_first, len(images["mask_indices_list"]))
    views, local = group
    first = views.start * batch_size
    rows = range(edges[views.start], edges[views.stop]) if views else range(0)
    crops = slice(first, views.stop * batch_size)
    return Views(
        batch_size,
        images["collated_global_crops"][crops] if views else None,
        images["collated_masks"][crops] if views else None,
        images["collated_local_crops"][local.start * batch_size : local.stop * batch_size] if local else None,
        images["mask_indices_list"][rows.start : rows.stop] - first * num_patches,
        images["masks_weight"][rows.start : rows.stop],
        rows,
    )


def cut_draws(draws: list[Draw], group: ViewGroup, batch_size: int) -> list[Draw]:
    """Cut drop-path draws over (global crops, local crops) to a group's sequences."""
    parts = [
        (tensor, range(views.start * batch_size, views.stop * batch_size))
        for tensor, views in enumerate(group)
        if views
    ]
    return [restrict(draw, parts) for draw in draws]


def padded_count(count: int, num_patches: int) -> int:
    """Return the least multiple of a 16th of ``num_patches`` that is not below ``count``, but at most all of them."""
    grain = max(1, num_patches // _ROWS_SHARE)
    return max(count, min(-(-count // grain) * grain, num_patches))


def pad_patches(images: dict, masked_in_first: int, apart: bool) -> tuple[dict, int]:
    """Return the collated batch with padded masked patches, and the number of rows of the first global crops.

    There is at least one row, so that no kernel gets an empty input. ``n_masked_patches`` stays the real number; rows
    of padding are those with ``masks_weight`` 0. Each stands for a patch that exists, so its features are finite; it is
    left out of the teacher's sums over rows.

    Args:
        masked_in_first: number of masked patches of the first global crops.
        apart: first and second global crops are separated later, so each half is padded to the same length. Otherwise
            the end is padded to the batch's upper bound, which is constant over steps for a process that draws its own
            masks.
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
