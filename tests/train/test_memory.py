"""The count is what a real step keeps; with a global batch it decides what is accumulated."""

import functools
from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_custom import distributed
from dinov2_custom.loss import soft_targets
from dinov2_custom.train.memory import (
    CATEGORIES,
    NCCL_BYTES,
    SHARE_OF_TENSORS,
    LiveBytes,
    as_on_a_gpu,
    largest_batch,
    least_checkpointing,
    measure_step,
    room_on,
    split_over_memory,
    step_limit,
)
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from dinov2_custom.train.views import cut_views
from tests.train.batches import random_batch, tiny_config

WIDE = ("student.arch=vit_micro", "train.batch_size_per_gpu=32", "student.drop_path_rate=0.3")


def kept_by_a_forward_pass(cfg, mode=None):
    """Return the bytes of storages autograd saves besides parameters, LiveBytes' count, and the bytes of results."""
    with torch.device("meta" if mode else "cpu"):
        model = SSLMetaArch(cfg).train()
    batch, live, kept = random_batch(cfg), LiveBytes(), {}
    first = model.masked_in_first(batch)
    ((group, draws),) = model.plan_groups(batch, torch.Generator().manual_seed(0))

    def pack(t):
        kept[id(t.untyped_storage())] = t.untyped_storage()
        return t

    with as_on_a_gpu(), mode or nullcontext(), live:
        if mode:
            model.to_empty(device="cpu")
        copy = torch.empty_like if mode else torch.clone
        views = cut_views({k: copy(v) if torch.is_tensor(v) else v for k, v in batch.items()}, group, first)
        own = {id(p.untyped_storage()) for p in model.parameters()}
        own |= {id(t.untyped_storage()) for t in views if torch.is_tensor(t)}
        before = live.total
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            features = model.get_student_output(views, draws)
        after = live.total
        outputs = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in features if t is not None}
    sizes = {key: storage.nbytes() for key, storage in kept.items() if key not in own}
    return sum(sizes.values()), after - before, sum(size for key, size in outputs.items() if key not in sizes)


@pytest.mark.parametrize("overrides", [(), ("train.lean=false",), ("student.ffn_layer=swiglu",)], ids=str)
def test_fake_count_is_what_a_real_run_keeps(overrides):
    cfg = tiny_config(*WIDE, *overrides, "train.view_groups=1")
    real, _, _ = kept_by_a_forward_pass(cfg)
    fake, counted, outputs = kept_by_a_forward_pass(cfg, FakeTensorMode(allow_non_fake_inputs=True))
    assert fake == real > 1e6
    assert counted == pytest.approx(fake + outputs, rel=0.01)


def test_categories_add_up_and_parameters_are_exact():
    cfg = tiny_config(*WIDE)
    memory = measure_step(SSLMetaArch, cfg)
    model = SSLMetaArch(cfg)
    student = sum(p.numel() for p in model.student.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert set(memory.categories) == set(CATEGORIES) and sum(memory.categories.values()) == memory.peak
    assert memory.categories["parameters"] == sum(4 * t.numel() for t in tensors)
    assert memory.categories["optimizer"] == 8 * student
    assert memory.categories["gradients"] <= 4 * student


def test_every_means_of_saving_saves():
    common = (*WIDE, "train.batch_size_per_gpu=64")
    plain = measure_step(SSLMetaArch, tiny_config(*common, "train.lean=false", "train.view_groups=1")).peak
    lean = measure_step(SSLMetaArch, tiny_config(*common, "train.view_groups=1")).peak
    grouped = measure_step(SSLMetaArch, tiny_config(*common, "train.view_groups=4")).peak
    selective = measure_step(SSLMetaArch, tiny_config(*common, "train.view_groups=4"), "selective").peak
    full = measure_step(SSLMetaArch, tiny_config(*common, "train.view_groups=4"), "full").peak
    assert plain > 1.2 * lean > 1.2 * grouped > selective > full


def test_auto_recomputes_as_little_as_fits():
    cfg = tiny_config(*WIDE, "train.batch_size_per_gpu=64")
    none, selective = measure_step(SSLMetaArch, cfg).peak, measure_step(SSLMetaArch, cfg, "selective").peak
    assert least_checkpointing(SSLMetaArch, cfg, none * 2) == "none"
    assert least_checkpointing(SSLMetaArch, cfg, (none + selective) / 2 * 8 / 7) == "selective"
    assert least_checkpointing(SSLMetaArch, cfg, 1000) == "full"


def test_auto_counts_what_other_processes_hold_of_sharded_weights():
    cfg = tiny_config(*WIDE, "train.batch_size_per_gpu=64")
    none, selective = measure_step(SSLMetaArch, cfg).peak, measure_step(SSLMetaArch, cfg, "selective").peak
    with torch.device("meta"):
        student = SSLMetaArch(cfg).student
    weights = 20 * sum(p.numel() for p in student.parameters())
    whole, sharded = dict.fromkeys(student, "NO_SHARD"), dict.fromkeys(student, "FULL_SHARD")
    needed = none - weights * 3 / 4  # in each of four processes
    available = (needed + (none - selective) / 2) / SHARE_OF_TENSORS + NCCL_BYTES
    assert least_checkpointing(SSLMetaArch, cfg, room_on(available, student, sharded, 4)) == "none"
    assert least_checkpointing(SSLMetaArch, cfg, room_on(available, student, whole, 4)) != "none"
    assert room_on(available, student, whole, 1) == available


@pytest.mark.parametrize("lean", ["true", "false"])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_one_process_of_several_counts_alone(tmp_path, monkeypatch, centering, lean):
    """Fake tensors cannot be sent, and the other processes may count at another time."""
    cfg = tiny_config(f"train.centering={centering}", f"train.lean={lean}", "dino.koleo_neighbours=all")
    alone, sent = measure_step(SSLMetaArch, cfg), []
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    for collective in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(torch.distributed, collective, lambda *_, name=collective, **__: sent.append(name))
    try:
        assert measure_step(SSLMetaArch, cfg) == alone and sent == []
        SSLMetaArch(cfg).forward_backward(random_batch(cfg), 0.05)
        assert {"all_reduce", "all_gather"} <= {*sent}  # which a step that is not only counted sends
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("separate", ["true", "false"])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_memory_of_the_heads_does_not_grow_with_the_batch(monkeypatch, centering, separate):
    """Apart from the kept logits, limited here to the class tokens of four images."""
    monkeypatch.setattr(soft_targets, "_KEPT_LOGITS", 8 * 65536)

    def heads(batch_size):
        cfg = tiny_config(
            f"train.batch_size_per_gpu={batch_size}", f"train.centering={centering}", "train.view_groups=4",
            f"ibot.separate_head={separate}", "dino.head_n_prototypes=65536", "ibot.head_n_prototypes=65536",
            "crops.global_crops_size=64",
        )  # fmt: skip
        return measure_step(SSLMetaArch, cfg).categories["heads"]

    of_an_image = (2 + 0.15 * 2 * 256) * 65536 * 2  # bytes of logits in 16 bits
    assert heads(256) - heads(128) < 3 * of_an_image  # features; below this chunks are not full


def test_kept_logits_are_bounded():
    def heads(batch_size):
        overrides = [f"train.batch_size_per_gpu={batch_size}", "dino.head_n_prototypes=65536", "train.view_groups=4"]
        return measure_step(SSLMetaArch, tiny_config(*overrides, "train.centering=sinkhorn_knopp")).categories["heads"]

    many, more = heads(1024), heads(2048)
    assert many > 2 * 4 * 2**26 and more - many < 0.02 * many  # class tokens' and patches', in float32


@functools.cache
def counted(batch: int):
    return measure_step(SSLMetaArch, tiny_config(f"train.batch_size_per_gpu={batch}"))


def room_for(batch: int) -> float:
    """Return the GPU memory in bytes needed for a step of ``batch`` images in a single process."""
    return 1.001 * counted(batch).peak / SHARE_OF_TENSORS


def config(batch: int, *overrides: str):
    return tiny_config("optim.global_batch=96", f"train.batch_size_per_gpu={batch}", *overrides)


def largest(cfg, device_bytes: float, world_size: int) -> int:
    limit = step_limit(SSLMetaArch, cfg, device_bytes, world_size)
    return largest_batch(cfg, limit, functools.partial(measure_step, SSLMetaArch))


def test_it_is_the_largest_divisor_that_fits():
    assert largest(config(96), room_for(96), 1) == 96
    assert largest(config(96), room_for(24), 1) == 24
    assert largest(config(96), 0.998 * room_for(24), 1) == 16
    assert largest(config(96), 1000, 1) == 1
    assert largest(config(12), room_for(96), 1) == 12


def test_several_processes_need_room_for_buffers_and_less_for_sharded_weights():
    alone, optimizer = room_for(24), counted(24).categories["optimizer"]  # 8 bytes per parameter
    whole = alone + NCCL_BYTES + optimizer / 2
    assert largest(config(48), whole, 2) == 24 and largest(config(48), whole - 1e6, 2) < 24
    sharded = [
        f"compute_precision.{model}.{part}.sharding_strategy=FULL_SHARD"
        for model in ("student", "teacher")
        for part in ("backbone", "dino_head")
    ]
    elsewhere = 20 / 8 * optimizer * 3 / 4 / SHARE_OF_TENSORS  # in the three others of four
    assert largest(config(48, *sharded), alone + NCCL_BYTES - elsewhere, 4) == 24


def test_what_does_not_fit_at_once_is_accumulated(monkeypatch):
    cfg = config(96, "optim.accumulation_steps=2")
    OmegaConf.set_readonly(cfg, False)
    assert (cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps) == (48, 2)
    split_over_memory(SSLMetaArch, cfg)  # on a CPU
    assert (cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps) == (48, 2)
    monkeypatch.setattr(distributed, "get_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, int(room_for(24))))  # nothing is free
    split_over_memory(SSLMetaArch, cfg)
    assert (cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps) == (24, 4)
