"""Fit each process's part of ``optim.global_batch`` to the memory of the GPUs. Read :func:`split_over_memory` first.

Not here: its division over the processes (``configs/checks.py``), the counting (``memory.py``).
"""

from __future__ import annotations

import torch
from omegaconf import OmegaConf

from dinov2_custom import distributed
from dinov2_custom.configs.checks import divisors_of
from dinov2_custom.parallel import BYTES_A_PARAMETER, NO_SHARD, strategies_on
from dinov2_custom.train.memory import NCCL_BYTES, SHARE_OF_TENSORS, measure_step
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch


def split_over_memory(cfg) -> None:
    """With ``optim.global_batch``, lower the batch of a process to what fits on its GPU, and accumulate the rest.

    How large the smallest GPU is decides, not what is free on it: started again, a run has the same batches. All
    processes must call it.
    """
    device = distributed.get_device()
    if not cfg.optim.global_batch or device.type != "cuda":
        return
    smallest = min(distributed.gather_objects(torch.cuda.mem_get_info(device)[1]))
    world_size = distributed.get_global_size()
    batch = largest_batch(cfg, smallest, world_size) if distributed.is_main_process() else 0
    batch = distributed.broadcast_object(batch)
    cfg.optim.accumulation_steps *= cfg.train.batch_size_per_gpu // batch
    cfg.train.batch_size_per_gpu = batch


def largest_batch(cfg, device_bytes: float, world_size: int) -> int:
    """Return the largest divisor of ``train.batch_size_per_gpu`` whose step fits on a GPU of so many bytes, else 1.

    With ``train.activation_checkpointing: auto`` without computing anything again: accumulating costs less than that.
    """
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    mode = {"auto": "none"}.get(cfg.train.activation_checkpointing, cfg.train.activation_checkpointing)
    with torch.device("meta"):
        student = SSLMetaArch(cfg).student
    strategies = strategies_on(cfg, student, device_bytes, world_size)
    numel = {name: sum(p.numel() for p in part.parameters()) for name, part in student.items()}
    whole = sum(count for name, count in numel.items() if strategies[name] == NO_SHARD)
    elsewhere = BYTES_A_PARAMETER * (sum(numel.values()) - whole) * (world_size - 1) / world_size
    buckets = NCCL_BYTES + 4 * whole if world_size > 1 else 0
    room = (device_bytes - buckets) * SHARE_OF_TENSORS + elsewhere
    divisors = divisors_of(cfg.train.batch_size_per_gpu)
    while divisors[0] > 1:
        cfg.train.batch_size_per_gpu = divisors[0]
        memory = measure_step(cfg, mode)
        if memory.peak <= room:
            break
        state = sum(memory.categories[name] for name in ("parameters", "gradients", "optimizer"))
        guess = divisors[0] * (room - state) / (memory.peak - state)  # on a straight line, which it nearly is
        divisors = [n for n in divisors[1:] if n <= guess] or [1]
    return divisors[0]
