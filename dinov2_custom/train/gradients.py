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
        arm = reducer.arm if index == count - 1 else None
        losses = model.forward_backward(batch, teacher_temp, generator, (index, count), on_last_backward=arm)
        sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
    reducer.finish()
    return {name: value / count for name, value in sums.items()}
