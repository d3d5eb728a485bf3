"""One step's gradients: several batches, several processes. Read :func:`accumulate_gradients` first."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dinov2_custom import distributed
from dinov2_custom.parallel import GradientReducer
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch


def accumulate_gradients(
    cfg,
    model: SSLMetaArch,
    reducer: GradientReducer,
    batch: dict,
    batches: Iterator[dict],
    teacher_temp: float,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Run ``batch``, and the next ones of ``batches`` up to ``optim.accumulation_steps``; return their mean losses."""
    count, sums = cfg.optim.accumulation_steps, {}
    for index in range(count):
        if index > 0:
            batch = next(batches)
        if index == count - 1:
            reducer.arm()
        losses = model.forward_backward(batch, teacher_temp, generator, micro_batch=(index, count))
        sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
    reducer.finish()
    return {name: value / count for name, value in sums.items()}


def over_all_ranks(losses: dict[str, torch.Tensor], signum: int) -> tuple[dict[str, torch.Tensor], int]:
    """Return the losses averaged over all processes, and the signal that any of them was asked to stop by, or 0.

    ``signum``: the one that asked this process, or 0.
    """
    if not distributed.is_enabled():
        return losses, signum
    values = torch.stack(list(losses.values())).float()
    signals = values.new_zeros(64)
    signals[signum] = 1.0
    reduced = distributed.all_reduce(torch.cat((values, signals[1:])))
    means, asked = reduced[: len(values)] / distributed.get_global_size(), reduced[len(values) :].nonzero().flatten()
    return dict(zip(losses, means, strict=True)), int(asked[0]) + 1 if len(asked) else 0
