"""One step's gradients: several batches, several processes. Read :func:`accumulate_gradients` first."""

from __future__ import annotations

from collections.abc import Iterator

import torch

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
