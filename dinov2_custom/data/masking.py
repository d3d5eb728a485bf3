"""MaskingGenerator: random rectangles of patches for the masked-patch loss.

Draw for draw upstream's sampler, filled by slices instead of patch by patch. Which crops of a batch get a mask, and how
large, is decided in ``collate``. Read :meth:`MaskingGenerator.__call__` first.
"""

from __future__ import annotations

import math
import random
from types import ModuleType

import numpy as np

TRIES = 10


class MaskingGenerator:
    """Sample boolean masks over a grid of patches, built from rectangles.

    ``input_size``: (rows, columns) of the grid, or one number for both. A rectangle's area is uniform between
    ``min_num_patches`` and the smaller of ``max_num_patches`` (None: no bound of its own) and what is still missing;
    its aspect is log-uniform in ``min_aspect``..``max_aspect`` (None: ``1 / min_aspect``).

    Source: upstream data/masking.py (BEiT's blockwise masking, https://arxiv.org/abs/2106.08254, algorithm 1).
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: float | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ):
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.num_patches = self.height * self.width
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        limits = (max_num_patches, num_masking_patches, self.num_patches)
        self.max_num_patches = next(limit for limit in limits if limit is not None)
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))

    def __repr__(self) -> str:
        low, high = self.log_aspect_ratio
        return (
            f"MaskingGenerator({self.height} x {self.width} patches, rectangles of {self.min_num_patches} to "
            f"{self.max_num_patches}, log aspect {low:.3f} to {high:.3f})"
        )

    def get_shape(self) -> tuple[int, int]:
        """Return (rows, columns) of the grid."""
        return self.height, self.width

    def __call__(self, num_masking_patches: int = 0, rng: random.Random | ModuleType | None = None) -> np.ndarray:
        """Return a bool (rows, columns) mask of about ``num_masking_patches`` patches, never more.

        Stops early when ``TRIES`` rectangles in a row do not fit, so a tiny grid may stay empty. ``rng`` None draws
        from the ``random`` module's global stream, as upstream does.
        """
        rng = rng or random
        mask = np.zeros((self.height, self.width), dtype=bool)
        count = 0
        while count < num_masking_patches:
            added = self._add_rectangle(mask, min(num_masking_patches - count, self.max_num_patches), rng)
            if added == 0:
                break
            count += added
        return mask

    def _add_rectangle(self, mask: np.ndarray, max_added: float, rng: random.Random | ModuleType) -> int:
        """Set one rectangle that adds 1..``max_added`` patches to ``mask``; return how many, 0 if none was found."""
        for _ in range(TRIES):
            area = rng.uniform(self.min_num_patches, max_added)
            aspect = math.exp(rng.uniform(*self.log_aspect_ratio))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w >= self.width or h >= self.height:
                continue
            top = rng.randint(0, self.height - h)
            left = rng.randint(0, self.width - w)
            patch = mask[top : top + h, left : left + w]
            added = h * w - int(np.count_nonzero(patch))
            if 0 < added <= max_added:
                patch[...] = True
                return added
        return 0
