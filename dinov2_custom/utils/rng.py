"""Random generators as pure functions of a seed and counters: no draw in this project reads global random state.

``generator_for(seed, "drop_path", iteration)`` gives the same stream in every process, independent of earlier draws.
This makes a resumed run equal to an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *counters: int | str) -> int:
    """Hash ``seed`` and ``counters`` to 63 bits (BLAKE2b of their text)."""
    text = "\x1f".join(str(part) for part in (seed, *counters))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def random_for(seed: int, *counters: int | str) -> random.Random:
    """Return a Python generator for scalar draws (crop boxes, jitter, masks)."""
    return random.Random(seed_for(seed, *counters))


def generator_for(seed: int, *counters: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a torch generator on ``device`` for tensor draws (weights, drop path)."""
    import torch

    return torch.Generator(device=device).manual_seed(seed_for(seed, *counters))
