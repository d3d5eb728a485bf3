"""Turn a list of augmented samples into one batch: crops stacked crop by crop, and the masks of the masked-patch loss.

Needs no labels: a sample is the augmentation's dict, or (dict, anything).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dinov2_custom.errors import DataError


def collate_data_and_cast(
    samples_list: Sequence[Any],
    mask_ratio_tuple: Sequence[float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: Callable[..., np.ndarray] | None = None,
    rng: random.Random | None = None,
) -> dict[str, Any]:
    """Collate ``samples_list`` (b samples with G global and L local crops each).

    Returns crops in crop-major order (all samples' crop 1, then all samples' crop 2, ...), N = ``n_tokens``:

    * ``collated_global_crops`` (G*b, 3, g, g) and ``collated_local_crops`` (L*b, 3, l, l), in ``dtype``;
      without local crops the latter is (0, 3, g, g)
    * ``collated_masks`` (G*b, N) bool: ``int(G*b*mask_probability)`` crops are masked, their ratios spread evenly over
      ``mask_ratio_tuple``
    * ``mask_indices_list`` (M,) int64: flat positions of the masked patches in G*b*N; M may be 0
    * ``masks_weight`` (M,) float32: 1 / number of masked patches of the crop
    * ``upperbound`` int >= M, ``n_masked_patches`` (1,) int64 = M

    ``rng`` None draws from the ``random`` module's global stream, as upstream does, draw for draw.

    Source: upstream data/collate.py.
    """
    samples = [_augmented(sample) for sample in samples_list]
    global_crops = _stack_crop_major(samples, "global_crops")
    local_crops = _stack_crop_major(samples, "local_crops")
    if local_crops is None:
        local_crops = global_crops[:0]
    masks, upperbound = draw_masks(
        len(global_crops), mask_ratio_tuple, mask_probability, n_tokens, mask_generator, rng or random
    )
    return {
        "collated_global_crops": global_crops.to(dtype),
        "collated_local_crops": local_crops.to(dtype),
        **describe_masks(masks, upperbound),
    }


def describe_masks(masks: torch.Tensor, upperbound: int) -> dict[str, Any]:
    """Return the mask entries of :func:`collate_data_and_cast`'s batch for ``masks`` (crops, patches)."""
    positions = masks.flatten().nonzero().flatten()
    masked_per_crop = masks.sum(-1)
    return {
        "collated_masks": masks,
        "mask_indices_list": positions,
        "masks_weight": (1 / masked_per_crop.clamp(min=1.0)).repeat_interleave(masked_per_crop),
        "upperbound": upperbound,
        "n_masked_patches": torch.tensor([len(positions)], dtype=torch.long),
    }


def _augmented(sample: Any) -> dict[str, Any]:
    crops = sample[0] if isinstance(sample, tuple | list) else sample
    if not isinstance(crops, dict) or "global_crops" not in crops:
        raise DataError(
            "collate: expected samples that are the augmentation's dict or (dict, target), "
            f"got {type(crops).__name__}; give the dataset transform=DataAugmentationDINO(...)"
        )
    return crops


def _stack_crop_major(samples: Sequence[dict[str, Any]], key: str) -> torch.Tensor | None:
    number = len(samples[0][key])
    return torch.stack([sample[key][i] for i in range(number) for sample in samples]) if number else None


def draw_masks(
    num_crops: int,
    mask_ratio_tuple: Sequence[float],
    mask_probability: float,
    n_tokens: int,
    mask_generator: Callable[..., np.ndarray],
    rng: random.Random | ModuleType,
) -> tuple[torch.Tensor, int]:
    """Return bool masks (``num_crops``, ``n_tokens``) of a batch and an upper bound on the number of masked patches.

    The bins of the ratios and all arithmetic on them are float32, so that rounding down to a whole number of patches
    gives the same result as upstream.
    """
    num_masked = int(num_crops * mask_probability)
    edges = torch.linspace(*mask_ratio_tuple, num_masked + 1).numpy()
    masks, upperbound = [], 0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        ratio = low + (high - low) * np.float32(rng.random())
        masks.append(mask_generator(int(np.float32(n_tokens) * ratio), rng=rng))
        upperbound += int(np.float32(n_tokens) * high)
    masks += [mask_generator(0, rng=rng) for _ in range(num_crops - num_masked)]
    rng.shuffle(masks)
    return torch.from_numpy(np.stack(masks).reshape(num_crops, -1)), upperbound
