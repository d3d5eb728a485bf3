"""A scalar schedule over iterations: frozen, then a linear warm-up, then half a cosine.

All counts are in iterations.
"""

from __future__ import annotations

import operator

import numpy as np


class CosineScheduler:
    """A precomputed value for every iteration: ``scheduler[iteration]``.

    ``freeze_iters`` zeros; ``warmup_iters`` values from ``start_warmup_value`` to ``base_value``, both included; for
    the n remaining ones, final + (base - final) (1 + cos(pi i / n)) / 2, i = 0 .. n-1; from ``total_iters`` on
    ``final_value``.

    Attributes:
        schedule: float64 array of ``total_iters`` values; may be changed in place.

    Raises:
        ValueError: a count is negative, or warm-up and freeze exceed ``total_iters``.
        TypeError: a count is not an integer.

    Source: upstream utils/utils.py; the cosine is SGDR's (Loshchilov and Hutter 2017, equation 5).
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0,
        freeze_iters: int = 0,
    ):
        total, warmup, freeze = (operator.index(count) for count in (total_iters, warmup_iters, freeze_iters))
        rest = total - warmup - freeze
        if min(total, warmup, freeze, rest) < 0:
            raise ValueError(
                f"expected 0 <= warmup_iters + freeze_iters <= total_iters, got {warmup} + {freeze} and {total}: "
                "shorten the warm-up or train longer"
            )
        self.total_iters = total
        self.final_value = final_value
        cosine = 1 + np.cos(np.pi * np.arange(rest) / max(rest, 1))
        self.schedule = np.concatenate(
            [
                np.zeros(freeze),
                np.linspace(start_warmup_value, base_value, warmup),
                final_value + 0.5 * (base_value - final_value) * cosine,
            ]
        )

    def __len__(self) -> int:
        return self.total_iters

    def __getitem__(self, iteration: int) -> float:
        if iteration < 0:
            raise IndexError(f"expected an iteration >= 0, got {iteration}")
        return self.final_value if iteration >= self.total_iters else float(self.schedule[iteration])
