"""Count the bytes alive during a training step, for any configuration, without a device and without computing.

The step runs on tensors without data (torch's fake tensors) and every allocation and release is counted, so the count
is exact for tensors; what an allocator loses between them, a CUDA context (about 0.5 GB) and libraries' workspaces are
not in it. The optimizer is counted as AdamW's two moments. ``plan/memory.py`` prints the count and the largest batch
that fits on a GPU.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2_custom import distributed
from dinov2_custom.configs.checks import divisors_of
from dinov2_custom.layers import backend as kernels
from dinov2_custom.layers import prototype_loss
from dinov2_custom.parallel import NO_SHARD, bytes_elsewhere, choose_strategies, strategies_on
from dinov2_custom.train import fast_paths
from dinov2_custom.utils.dtype import as_torch_dtype

if TYPE_CHECKING:
    from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

# Share of a device's memory reserved for nccl's buffers, which it allocates itself: an allowance.
NCCL_BYTES = 10**9
SHARE_OF_TENSORS = 7 / 8  # of a device's memory; the rest is for what the count does not include
Architecture = type["SSLMetaArch"]  # an argument, because ssl_meta_arch imports this module
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "heads", "batch")
MODES = ("none", "selective", "full")  # of train.activation_checkpointing


class StepMemory(NamedTuple):
    """Bytes alive at the peak of a step: in total, and by category.

    parameters: of student and teacher. heads: logits, targets and gradients of the prototypes. batch: the images of
    this step and of the next one, which is copied ahead.
    """

    peak: int
    categories: dict[str, int]

    @property
    def state(self) -> int:
        """The bytes that do not depend on the batch."""
        return sum(self.categories[name] for name in ("parameters", "gradients", "optimizer"))


class LiveBytes(TorchDispatchMode):
    """Count the storages alive, each under the category that was current when it was allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.category = "activations"
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._known: dict[int, tuple[weakref.ref, str]] = {}
        self._inside = False

    @property
    def total(self) -> int:
        return sum(self.live.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            self._add_all(result)
        return result

    def as_one_operation(self, function: Callable) -> Callable:
        """Return ``function`` as if compiled: intermediate tensors inside it take no memory."""

        def run(*args):
            self._inside = True
            result = function(*args)
            self._inside = False
            self._add_all(result)
            return result

        return run

    def _add_all(self, result: object) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)

    def add(self, tensor: Tensor) -> None:
        """Count ``tensor``'s storage from now until it is released."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def released(_) -> None:
            _, category = self._known.pop(key)
            self.live[category] -= size

        self._known[key] = (weakref.ref(storage, released), self.category)
        self.live[self.category] += size
        if self.total > sum(self.at_peak.values()):
            self.at_peak = self.live.copy()

    def move(self, tensor: Tensor, category: str) -> None:
        """Count ``tensor`` under another category from now on."""
        storage = tensor.untyped_storage()
        reference, former = self._known[id(storage)]
        self._known[id(storage)] = (reference, category)
        self.live[former] -= storage.nbytes()
        self.live[category] += storage.nbytes()

    @contextmanager
    def under(self, category: str):
        """Count allocations in the body under ``category``."""
        former, self.category = self.category, category
        try:
            yield
        finally:
            self.category = former


class _FusedAttention(torch.autograd.Function):
    """Output shapes and saved tensors of a fused attention kernel on a GPU."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextmanager
def as_on_a_gpu():
    """Make attention save what a fused kernel saves, and use a GPU's chunks of logits."""
    attention, chunks = kernels.attention, prototype_loss._CHUNK_LOGITS["cpu"]
    products = prototype_loss._PRODUCT_LOGITS.pop("cpu")
    kernels.attention = lambda q, k, v, **_: _FusedAttention.apply(q, k, v)
    prototype_loss._CHUNK_LOGITS["cpu"] = prototype_loss._CHUNK_LOGITS["cuda"]
    try:
        yield
    finally:
        kernels.attention, prototype_loss._CHUNK_LOGITS["cpu"] = attention, chunks
        prototype_loss._PRODUCT_LOGITS["cpu"] = products


def memory_for_steps(model: SSLMetaArch) -> int:
    """Return how many bytes the tensors of a step, ``model`` included, may take in the process with the least memory.

    This counts memory of the device that is free or already reserved by torch; see :func:`room_on`. All processes must
    call it.
    """
    available = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved(model.device)
    if distributed.is_enabled():
        strategies = choose_strategies(model.cfg, model)
        available = room_on(available, model.student, strategies, distributed.get_global_size())
    return int(min(distributed.gather_objects(available)))


def room_on(available: float, student: nn.ModuleDict, strategies: dict[str, str], world_size: int) -> float:
    """Return the limit for a step counted with whole weights, of which ``SHARE_OF_TENSORS`` is to be used.

    ``available`` bytes of one process's device, less the gradient buckets and nccl's buffers, plus the shards of the
    weights that other processes hold.
    """
    if world_size == 1:
        return available
    whole = (part for name, part in student.items() if strategies[name] == NO_SHARD)
    available -= NCCL_BYTES + 4 * sum(p.numel() for part in whole for p in part.parameters())
    return available + bytes_elsewhere(student, strategies, world_size) / SHARE_OF_TENSORS


def least_checkpointing(arch: Architecture, cfg, available: int) -> str:
    """Return the least activation checkpointing that keeps a step below ``available`` bytes; ``full`` if none does.

    ``SHARE_OF_TENSORS`` leaves room for what the count does not include.
    """
    room = available * SHARE_OF_TENSORS
    return next((mode for mode in ("none", "selective") if measure_step(arch, cfg, mode).peak < room), "full")


def split_over_memory(arch: Architecture, cfg) -> None:
    """With ``optim.global_batch``, lower the batch of a process to what fits on its GPU, and accumulate the rest.

    The limit is the memory of the smallest GPU, not what is free on it, so that a restarted run has the same batches.
    All processes must call it.
    """
    device = distributed.get_device()
    if not cfg.optim.global_batch or device.type != "cuda":
        return
    smallest = min(distributed.gather_objects(torch.cuda.mem_get_info(device)[1]))
    batch = 0
    if distributed.is_main_process():
        limit = step_limit(arch, cfg, smallest, distributed.get_global_size())
        batch = largest_batch(cfg, limit, functools.partial(measure_step, arch))
    batch = distributed.broadcast_object(batch)
    cfg.optim.accumulation_steps *= cfg.train.batch_size_per_gpu // batch
    cfg.train.batch_size_per_gpu = batch


def step_limit(arch: Architecture, cfg, device_bytes: float, world_size: int) -> float:
    """Return how many bytes a step, counted with whole weights, may take on each of ``world_size`` GPUs."""
    with torch.device("meta"):
        student = arch(cfg).student
    strategies = strategies_on(cfg, student, device_bytes, world_size)
    return room_on(device_bytes, student, strategies, world_size) * SHARE_OF_TENSORS


def largest_batch(cfg, limit: float, measure: Callable[..., StepMemory]) -> int:
    """Return the largest divisor of ``train.batch_size_per_gpu`` whose step takes at most ``limit`` bytes, else 1.

    ``measure(cfg, checkpointing)`` counts a step, as :func:`measure_step` does. With
    ``train.activation_checkpointing: auto`` this assumes no recomputation, as accumulation costs less.
    """
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    mode = {"auto": "none"}.get(cfg.train.activation_checkpointing, cfg.train.activation_checkpointing)
    divisors = divisors_of(cfg.train.batch_size_per_gpu)
    while divisors[0] > 1:
        cfg.train.batch_size_per_gpu = divisors[0]
        memory = measure(cfg, mode)
        if memory.peak <= limit:
            break
        # memory is nearly linear in the batch
        guess = divisors[0] * (limit - memory.state) / (memory.peak - memory.state)
        divisors = [n for n in divisors[1:] if n <= guess] or [1]
    return divisors[0]


def measure_step(
    arch: Architecture,
    cfg,
    checkpointing: str = "none",
    inside: AbstractContextManager = nullcontext(),  # noqa: B008 - does nothing
    compiler: fast_paths.Compiler | None = None,
) -> StepMemory:
    """Run one step of ``arch(cfg)`` on fake tensors and return its peak; ``auto`` precisions count as bf16.

    Args:
        checkpointing: ``none``, ``selective`` or ``full``.
        inside: context manager entered for the step only, to observe it.
        compiler: used in place of torch.compile, as with ``train.compile: on``.
    """
    live, mode = LiveBytes(), FakeTensorMode(allow_non_fake_inputs=True)
    batch = batch_shapes(cfg)
    with torch.device("meta"):
        model = arch(cfg).train()
    model.set_checkpointing(checkpointing)
    if compiler is not None:
        fast_paths.install(model, lambda function: live.as_one_operation(compiler(function)))
    crops = {name: torch.empty(shape, device="meta") for name, (shape, _) in batch.items() if "crops" in name}
    groups = model.plan_groups(crops, torch.Generator().manual_seed(0))  # draws need real values
    with as_on_a_gpu(), mode, live:
        with live.under("parameters"):
            model.to_empty(device="cpu")
        trainable = list(model.student.parameters())
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(lambda p: live.move(p.grad, "gradients"))
        _label(model, live)
        with live.under("batch"):
            images, _next = (
                {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in batch.items()} for _ in range(2)
            )
        images["upperbound"] = batch["mask_indices_list"][0][0]
        model.constant_shapes = True
        for loss in (model.dino_loss, model.ibot_patch_loss, model.koleo_loss):
            loss.over_all_ranks = False  # fake tensors cannot be sent, and other processes may not be counting
        model.precision = lambda *names: _bf16_unless_given(cfg, *names)
        model.plan_groups = lambda *_: groups
        model.masked_in_first = lambda images: batch["mask_indices_list"][0][0] // 2
        live.live["optimizer"] += 8 * sum(p.numel() for p in trainable)
        live.at_peak.clear()
        with inside:
            model.forward_backward(images, 0.05)
    categories = {name: live.at_peak[name] for name in CATEGORIES}
    return StepMemory(sum(categories.values()), categories)


def _label(model: SSLMetaArch, live: LiveBytes) -> None:
    """Count allocations of heads and losses under ``heads``."""

    def labelled(call):
        def run(*args, **kwargs):
            with live.under("heads"):
                return call(*args, **kwargs)

        return run

    for name in ("run_heads", "compute_losses", "assign"):
        setattr(model, name, labelled(getattr(model, name)))


def _bf16_unless_given(cfg, model: str, part: str) -> torch.dtype:
    dtype = cfg.compute_precision[model][part].mixed_precision.param_dtype
    return torch.bfloat16 if dtype == "auto" else as_torch_dtype(dtype)


def batch_shapes(cfg) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each tensor of a batch with the mean number of masked patches."""
    crops, b = cfg.crops, cfg.train.batch_size_per_gpu
    patches = (crops.global_crops_size // cfg.student.patch_size) ** 2
    masked_crops = int(2 * b * cfg.ibot.mask_sample_probability)
    masked = int(masked_crops * patches * sum(cfg.ibot.mask_ratio_min_max) / 2)
    local, size = crops.local_crops_number * b, crops.local_crops_size
    return {
        "collated_global_crops": ((2 * b, 3, crops.global_crops_size, crops.global_crops_size), torch.float32),
        "collated_local_crops": ((local, 3, size, size), torch.float32),
        "collated_masks": ((2 * b, patches), torch.bool),
        "mask_indices_list": ((masked,), torch.long),
        "masks_weight": ((masked,), torch.float32),
        "n_masked_patches": ((1,), torch.long),
    }
