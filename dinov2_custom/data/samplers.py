"""Order of the images: a keyed permutation that needs no list of indices, and samplers based on it.

Training maps draw numbers to images with :func:`permuted_index`; the samplers have upstream's names and per-rank
meaning.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import torch.distributed
from torch.utils.data import Sampler

from dinov2_custom.utils.rng import seed_for

ROUNDS = 8
MIN_HALF_BITS = 2
_MASK_64 = (1 << 64) - 1


def permuted_index(n: int, size: int, seed: int) -> int:
    """Return the image (0..size-1) of draw ``n`` >= 0; each pass of ``size`` draws has every image exactly once.

    Each pass ``n // size`` has its own permutation: a Feistel network over the next power of four, applied repeatedly
    until the value is below ``size`` (cycle walking). It takes O(1) memory and about 10 microseconds.

    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002 (cycle walking).
    """
    passes, index = divmod(n, size)
    half_bits = max(MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    keys = _round_keys(seed, passes)
    while True:
        left, right = index >> half_bits, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


@lru_cache(maxsize=256)
def _round_keys(seed: int, passes: int) -> tuple[int, ...]:
    return tuple(seed_for(seed, "permutation", passes, i) for i in range(ROUNDS))


def _mix(x: int) -> int:
    """Mix 64 bits (finalizer of SplitMix64, Steele et al., OOPSLA 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def start_and_step(start: int | None, step: int | None) -> tuple[int, int]:
    """Default to this process's rank and the world size if torch.distributed is initialised."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    start = start if start is not None else torch.distributed.get_rank() if running else 0
    step = step if step is not None else torch.distributed.get_world_size() if running else 1
    return start, step


class EpochSampler(Sampler[int]):
    """Yield this rank's share of an epoch of ``size`` samples from ``sample_count`` images (repeated if fewer).

    Samples alternate between ranks (rank r has samples r, r + W, ...). ``set_epoch`` changes the shuffling.
    """

    def __init__(
        self,
        *,
        size: int,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
    ):
        self._size = size
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = start_and_step(start, step)
        self._epoch = 0

    def __iter__(self) -> Iterator[int]:
        seed = seed_for(self._seed, "epoch", self._epoch)
        for n in range(self._start, self._size, self._step):
            yield permuted_index(n, self._sample_count, seed) if self._shuffle else n % self._sample_count

    def __len__(self) -> int:
        return len(range(self._start, self._size, self._step))

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch


class InfiniteSampler(Sampler[int]):
    """Yield endless passes over ``sample_count`` images, with samples alternating between ranks.

    All ranks together see every image once per pass. ``advance``: samples that this rank has already consumed.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
    ):
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = start_and_step(start, step)
        self._advance = advance

    def __iter__(self) -> Iterator[int]:
        for n in itertools.count(self._start + self._advance * self._step, self._step):
            yield permuted_index(n, self._sample_count, self._seed) if self._shuffle else n % self._sample_count


class ShardedInfiniteSampler(Sampler[int]):
    """Yield endless passes over this rank's own share of the images.

    The shares (``sample_count // W`` images each, fixed by ``seed``; the remainder is unused) are reshuffled in each
    pass. ``advance``: samples that this rank has already consumed. ``use_new_shuffle_tensor_slice`` is accepted and
    ignored. With fewer images than ranks, every rank uses all images.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
        use_new_shuffle_tensor_slice: bool = False,
    ):
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start, self._step = start_and_step(start, step)
        self._advance = advance

    def __iter__(self) -> Iterator[int]:
        start, step = (self._start, self._step) if self._sample_count >= self._step else (0, 1)
        share = self._sample_count // step
        order = seed_for(self._seed, "share", self._start)
        for n in itertools.count(self._advance):
            place = permuted_index(n, share, order) if self._shuffle else n % share
            place = start + place * step
            yield permuted_index(place, self._sample_count, self._seed) if self._shuffle else place
