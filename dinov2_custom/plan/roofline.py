"""Predict what bounds a training step on a GPU, kernel by kernel, without a GPU: compute or memory traffic.

The step runs on tensors without data, as in ``train/memory.py``. Each kernel takes the maximum of its compute time,
its memory time and the launch latency; no overlap and no caching is assumed. This is a model, not a measurement:
``timing.py`` measures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2_custom.train import memory
from dinov2_custom.train.gpus import GPU
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

# assumed fractions of the data-sheet rates
PRODUCTS = 0.7  # reached by large 16-bit products
TF32_SHARE = 0.45  # of that for float32 products
ATTENTION = 0.4  # fused, head width 64
BYTES = 0.85
LAUNCH = 4e-6  # minimum seconds per kernel
OPTIMIZER_BYTES = 28 + 12  # per parameter: AdamW reads p, g, m, v and writes p, m, v; the moving average t, s and t
# Operators that only view a tensor, or allocate one without touching its bytes. Indices (int64) are handled by the
# host.
FREE = frozenset(
    "alias as_strided detach device dtype empty empty_like empty_strided expand lift_fresh new_empty permute select "
    "size slice split split_with_sizes squeeze stride t transpose unbind unfold unsqueeze view _reshape_alias "
    "_unsafe_view".split()
)


class Kernel(NamedTuple):
    """The work of one kernel: ``operations`` at ``share`` of a GPU's rate, and ``moved`` bytes.

    ``kind``: ``products``, ``attention``, or the operator's name.
    """

    kind: str
    operations: int
    share: float
    moved: int

    def seconds(self, gpu: GPU) -> float:
        return max(self.operations / (self.share * gpu.flops), self.moved / (BYTES * gpu.bandwidth), LAUNCH)


class Roofline(TorchDispatchMode):
    """Count the kernels of what runs inside, for the seconds that they take on any GPU.

    Attributes:
        counts: kernel -> how many.
        memory: of the step that :func:`predict` counted.
        num_parameters: of its student.
    """

    memory: memory.StepMemory
    num_parameters: int

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Kernel] = Counter()
        self._inside = False

    @property
    def kernels(self) -> int:
        return self.counts.total()

    @property
    def operations(self) -> int:
        return sum(count * kernel.operations for kernel, count in self.counts.items())

    def seconds(self, gpu: GPU) -> Counter[str]:
        """Return kind -> seconds on ``gpu``, of forward and backward passes."""
        seconds: Counter[str] = Counter()
        for kernel, count in self.counts.items():
            seconds[kernel.kind] += count * kernel.seconds(gpu)
        return seconds

    def update_seconds(self, gpu: GPU) -> float:
        """Return the seconds of the optimizer and the teacher."""
        return OPTIMIZER_BYTES * self.num_parameters / (BYTES * gpu.bandwidth)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self._inside:
            return result
        name = func._schema.name.split("::")[1]
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(result)
        if name.removesuffix("_") not in FREE and not all(x.dtype == torch.long for x in (*inputs, *outputs)):
            operations = product_operations(name, args, result)
            share = PRODUCTS * (TF32_SHARE if inputs and inputs[0].dtype == torch.float32 else 1.0)
            self.add("products" if operations else name, operations, share, moved_bytes(name, inputs, outputs))
        return result

    def add(self, kind: str, operations: int, share: float, moved: int) -> None:
        """Count one kernel; see :class:`Kernel`."""
        self.counts[Kernel(kind, operations, share, moved)] += 1

    def as_kernels(self, function: Callable) -> Callable:
        """Return ``function`` as torch.compile makes it: what is between its inputs and its results moves nothing."""

        def run(*args):
            self._inside = True
            result = function(*args)
            self._inside = False
            for moved in moved_by_piece(function.__name__, tensors_in(args), tensors_in(result)):
                self.add(f"{function.__name__}*", 0, PRODUCTS, moved)
            return result

        return run


def product_operations(name: str, args: tuple, result: object) -> int:
    """Return the operations of a matrix product or convolution, 0 for anything else."""
    if name in ("mm", "addmm", "bmm"):
        first, second = args[-2:] if name != "addmm" else args[1:3]
        return 2 * first.numel() * second.shape[-1]
    if name == "convolution":
        return 2 * result.numel() * prod(args[1].shape[1:])
    return 0


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size(tensors: Iterable[Tensor]) -> int:
    """Return their bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def moved_bytes(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Return the bytes a kernel reads and writes."""
    if name == "index_select":
        return 2 * size(outputs)
    if name in ("index_add", "index_add_"):  # a copy, then the rows
        return (0 if name.endswith("_") else 2 * size(outputs)) + 3 * size(inputs[-1:])
    if name.startswith(("zeros", "new_zeros", "fill", "ones")):
        return size(outputs)
    if name == "copy_":  # what was there is not read
        return size(inputs[1:]) + size(outputs)
    return size({id(x): x for x in inputs}.values()) + size(outputs)  # ``out=`` may name an input


# Compiled pieces of several kernels: passes over all inputs, and small kernels that finish sums, as inductor and Triton
# of torch 2.15 make them for sm_90.
PASSES = {"fused_cross_entropy": 3, "gated_backward": 2}
FINISHING = {"norm_backward": 4, "sum_of_rows": 1, "fused_cross_entropy": 4}


def moved_by_piece(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> list[int]:
    """Return the bytes of each kernel of a compiled piece."""
    if name == "take_rows":
        return [outputs[0].numel() * inputs[0].element_size() + size(inputs[1:]) + size(outputs)]
    if name == "add_rows_":
        return [2 * inputs[2].numel() * inputs[0].element_size() + size(inputs[1:])]
    if name == "gelu_backward_":
        return [size(inputs) + size(inputs[:1]) + size(outputs)]
    passes = PASSES.get(name, 1)
    return [size(inputs)] * (passes - 1) + [size(inputs) + size(outputs)] + [0] * FINISHING.get(name, 0)


@contextmanager
def counting_attention(roofline: Roofline):
    """Let the stand-in of the fused attention kernel count its operations in ``roofline``."""

    class Counted(memory._FusedAttention):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.operations = 4 * q.numel() * q.shape[-2]
            roofline.add("attention", ctx.operations, ATTENTION, 4 * q.numel() * q.element_size())
            return memory_attention.forward(ctx, q, k, v)

        @staticmethod
        def backward(ctx, gradient):
            moved = 8 * gradient.numel() * gradient.element_size()
            roofline.add("attention", ctx.operations * 5 // 2, ATTENTION, moved)  # the scores again
            return memory_attention.backward(ctx, gradient)

    memory_attention, memory._FusedAttention = memory._FusedAttention, Counted
    try:
        yield
    finally:
        memory._FusedAttention = memory_attention


def predict(cfg, checkpointing: str = "none", compiled: bool = False) -> Roofline:
    """Return the kernels and the memory of a step of ``cfg``, see :func:`memory.measure_step`."""
    roofline = Roofline()
    with counting_attention(roofline):
        roofline.memory = memory.measure_step(
            SSLMetaArch, cfg, checkpointing, inside=roofline, compiler=roofline.as_kernels if compiled else None
        )
    roofline.num_parameters = roofline.memory.categories["optimizer"] // 8  # two moments in float32
    return roofline


def assumptions() -> str:
    """Return the sentence that belongs to every figure of :class:`Roofline`."""
    return (
        f"predicted, not measured: 16-bit products at {PRODUCTS:.0%} of the GPU's data sheet, attention at "
        f"{ATTENTION:.0%}, memory at {BYTES:.0%}, {LAUNCH * 1e6:.0f} us minimum per kernel"
    )
