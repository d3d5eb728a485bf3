"""MaskingGenerator: random rectangles of patches for the masked-patch loss.

Draw for draw upstream's sampler, on the bits of one integer instead of patch by patch. Which crops of a batch get a
mask, and how large, is decided in ``collate``. Read :meth:`MaskingGenerator.__call__` first.
"""

from __future__ import annotations

import math
import random
from math import exp, sqrt
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
        # bit y * width + x is the patch of row y and column x; here the rectangle of h rows and w columns at the origin
        self._rectangles = [[0] * self.width]
        for y in range(self.height - 1):
            taller = [one | ((1 << w) - 1) << (y * self.width) for w, one in enumerate(self._rectangles[-1])]
            self._rectangles.append(taller)

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
        mask, count = 0, 0
        while count < num_masking_patches:
            mask, added = self._add_rectangle(mask, min(num_masking_patches - count, self.max_num_patches), rng)
            if added == 0:
                break
            count += added
        packed = np.frombuffer(mask.to_bytes((self.num_patches + 7) // 8, "little"), np.uint8)
        patches = np.unpackbits(packed, bitorder="little", count=self.num_patches)
        return patches.view(np.bool_).reshape(self.height, self.width)

    def _add_rectangle(self, mask: int, max_added: float, rng: random.Random | ModuleType) -> tuple[int, int]:
        """Return ``mask`` with one rectangle more that adds 1..``max_added`` patches, and how many; 0: none found."""
        height, width, draw = self.height, self.width, rng.random
        least, (low, high) = self.min_num_patches, self.log_aspect_ratio
        more, wider = max_added - least, high - low
        for _ in range(TRIES):
            area = least + more * draw()
            aspect = exp(low + wider * draw())
            h, w = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if w >= width or h >= height:
                continue
            top = rng.randrange(height - h + 1)
            rectangle = self._rectangles[h][w] << (top * width + rng.randrange(width - w + 1))
            added = (rectangle & ~mask).bit_count()
            if 0 < added <= max_added:
                return mask | rectangle, added
        return mask, 0
