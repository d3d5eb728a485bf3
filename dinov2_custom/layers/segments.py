"""Tokens of several crops in one (T, D) tensor, concatenated, and where each crop's tokens are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# [(number of sequences, tokens per sequence), ...]; their products sum to T.
Segments = list[tuple[int, int]]


def split_segments(x_TD: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    """Split packed tokens into one (num_sequences * length, D) view per segment."""
    return x_TD.split([num_sequences * length for num_sequences, length in segments])


def pack(x_list: Sequence[Tensor]) -> tuple[Tensor, Segments]:
    """Concatenate (B, N, D) tensors to (T, D); return it with their segments."""
    flat = [x.reshape(-1, x.shape[-1]) for x in x_list]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)), [(x.shape[0], x.shape[1]) for x in x_list]


def unpack(x_TD: Tensor, segments: Segments) -> list[Tensor]:
    """Split (T, D) into one (B, N, D) view per segment."""
    parts = split_segments(x_TD, segments)
    return [part.view(*segment, x_TD.shape[-1]) for part, segment in zip(parts, segments, strict=True)]
