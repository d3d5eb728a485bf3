"""What of a global batch goes through a GPU at once: the most that the count of a step says fits."""

import functools

import torch
from omegaconf import OmegaConf

from dinov2_custom import distributed
from dinov2_custom.train.global_batch import largest_batch, split_over_memory
from dinov2_custom.train.memory import NCCL_BYTES, SHARE_OF_TENSORS, measure_step
from tests.train.batches import tiny_config


@functools.cache
def counted(batch: int):
    return measure_step(tiny_config(f"train.batch_size_per_gpu={batch}"))


def room_for(batch: int) -> float:
    """Return how many bytes a GPU has to have for a step of ``batch`` images in a single process."""
    return 1.001 * counted(batch).peak / SHARE_OF_TENSORS


def config(batch: int, *overrides: str):
    return tiny_config("optim.global_batch=96", f"train.batch_size_per_gpu={batch}", *overrides)


def test_it_is_the_largest_divisor_that_fits():
    assert largest_batch(config(96), room_for(96), 1) == 96
    assert largest_batch(config(96), room_for(24), 1) == 24
    assert largest_batch(config(96), 0.998 * room_for(24), 1) == 16
    assert largest_batch(config(96), 1000, 1) == 1
    assert largest_batch(config(12), room_for(96), 1) == 12


def test_several_processes_need_room_for_what_travels_and_less_where_weights_are_shared_out():
    alone, optimizer = room_for(24), counted(24).categories["optimizer"]  # 8 bytes a parameter
    whole = alone + NCCL_BYTES + optimizer / 2
    assert largest_batch(config(48), whole, 2) == 24 and largest_batch(config(48), whole - 1e6, 2) < 24
    sharded = [
        f"compute_precision.{model}.{part}.sharding_strategy=FULL_SHARD"
        for model in ("student", "teacher")
        for part in ("backbone", "dino_head")
    ]
    elsewhere = 20 / 8 * optimizer * 3 / 4 / SHARE_OF_TENSORS  # in the three others of four
    assert largest_batch(config(48, *sharded), alone + NCCL_BYTES - elsewhere, 4) == 24


def test_what_does_not_fit_at_once_is_accumulated(monkeypatch):
    cfg = config(96, "optim.accumulation_steps=2")
    OmegaConf.set_readonly(cfg, False)
    assert (cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps) == (48, 2)
    split_over_memory(cfg)  # on a CPU
    assert (cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps) == (48, 2)
    monkeypatch.setattr(distributed, "get_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, int(room_for(24))))  # nothing is free
    split_over_memory(cfg)
    assert (cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps) == (24, 4)
