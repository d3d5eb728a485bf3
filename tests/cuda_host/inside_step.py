"""One training step on the stand-in: every option runs, nothing waits for the device, memory matches the count.

Run by ``test_cuda_host.py``.
"""

import pytest
import torch

from benchmarks.step import COMMON, batch_for, our_step
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.train.memory import measure_step
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.cuda_host.counts import counted, sync_stacks, syncs

SMALL = [*COMMON.split(), "student.arch=vit_tiny"]
PARTS = [f"{model}.{part}" for model in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]


def in_precision(name):
    return " ".join(f"compute_precision.{part}.mixed_precision.param_dtype={name}" for part in PARTS)


OPTIONS = [
    "",
    "train.lean=false",
    "train.view_groups=1",
    "train.view_groups=4 train.lean=false student.drop_path_rate=0.4",
    "student.drop_path_rate=0",
    "train.centering=sinkhorn_knopp",
    "train.centering=sinkhorn_knopp train.lean=false ibot.separate_head=true",
    "train.activation_checkpointing=selective",
    "train.activation_checkpointing=full ibot.separate_head=true",
    "student.num_register_tokens=4 student.ffn_layer=swiglufused",
    "ibot.loss_weight=0",
    "dino.loss_weight=0",
    in_precision("fp16"),
    in_precision("fp32"),
]


def pinned_batch(overrides, batch_size):
    batch = batch_for(overrides, batch_size)
    return {name: v.pin_memory() if torch.is_tensor(v) else v for name, v in batch.items()}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_never_waits_for_the_device(options):
    overrides = [*SMALL, "train.batch_size_per_gpu=2", *options.split()]
    step = our_step(overrides, pinned_batch(overrides, 2), device="cuda")
    step(0)
    with counted() as found, sync_stacks() as stacks:
        losses = step(1)
    assert {loss.device.type for loss in losses.values()} == {"cuda"}
    assert syncs(found) == found["sync event"] == 1, stacks  # the report of the previous step
    assert found["copy pageable to device"] == 0 and found["launches"] > 1000


@pytest.mark.parametrize("batch_size", [8, 32])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_allocator_needs_what_was_counted(batch_size, checkpointing):
    options = [f"train.batch_size_per_gpu={batch_size}", f"train.activation_checkpointing={checkpointing}"]
    overrides = [*COMMON.split(), "student.arch=vit_small", *options]
    cfg = load_run_config("", overrides, "unused", require_dataset=False, warn=lambda note: None)
    wanted = measure_step(SSLMetaArch, cfg, checkpointing)
    batch = pinned_batch(overrides, batch_size)
    ahead = sum(v.nbytes for v in batch.values() if torch.is_tensor(v))  # the next batch, which is not here yet
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = our_step(overrides, batch, device="cuda")
    for index in range(2):
        torch.cuda.reset_peak_memory_stats()
        step(index)
    found = torch.cuda.max_memory_allocated() - before
    assert found == pytest.approx(wanted.peak - ahead, rel=0.05)
