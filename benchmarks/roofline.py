"""Predict what bounds a training step on an H100, kernel by kernel, without a GPU: compute or memory traffic.

The step runs on tensors without data, as in ``dinov2_custom/train/memory.py``. Each kernel takes the maximum of its
compute time, its memory time and the launch latency; no overlap and no caching is assumed. This is a model, not a
measurement: ``benchmarks.gpu`` measures. ``python -m benchmarks.roofline --write`` writes results/roofline.md.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import add_write_option, describe, finish, table
from benchmarks.memory import config, step_operations, student_of
from dinov2_custom.train import memory
from dinov2_custom.train.flops import PEAK_FLOPS

PRODUCTS = 0.7 * PEAK_FLOPS["H100"]  # FLOP/s that large 16-bit products reach
TF32_SHARE = 0.45  # of that for float32 products
ATTENTION = 0.4 * PEAK_FLOPS["H100"]  # fused, head width 64
BYTES = 0.85 * 3.35e12  # bytes per second
LAUNCH = 4e-6  # minimum seconds per kernel
OPTIMIZER_BYTES = 28 + 12  # per parameter: AdamW reads p, g, m, v and writes p, m, v; the moving average t, s and t
MODELS = (("vit_small", 64), ("vit_base", 64), ("vit_large", 64), ("vit_large", 128))
# Operators that only view a tensor, or allocate one without touching its bytes. Indices (int64) are handled by the
# host.
FREE = frozenset(
    "alias as_strided detach device dtype empty empty_like empty_strided expand lift_fresh new_empty permute select "
    "size slice split split_with_sizes squeeze stride t transpose unbind unfold unsqueeze view _reshape_alias "
    "_unsafe_view".split()
)


class Roofline(TorchDispatchMode):
    """Sum the time of kernels in seconds by kind: ``products``, ``attention``, or the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()
        self.kernels = self.operations = 0
        self._inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self._inside:
            return result
        name = func._schema.name.split("::")[1]
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(result)
        if name.removesuffix("_") not in FREE and not all(x.dtype == torch.long for x in (*inputs, *outputs)):
            operations = product_operations(name, args, result)
            rate = PRODUCTS * (TF32_SHARE if inputs and inputs[0].dtype == torch.float32 else 1.0)
            self.add("products" if operations else name, operations, rate, moved_bytes(name, inputs, outputs))
        return result

    def add(self, kind: str, operations: int, rate: float, moved: int) -> None:
        """Add one kernel with ``operations`` at ``rate`` per second and ``moved`` bytes."""
        self.kernels += 1
        self.operations += operations
        self.seconds[kind] += max(operations / rate, moved / BYTES, LAUNCH)

    def as_kernels(self, function: Callable) -> Callable:
        """Return ``function`` as if fused by torch.compile: only inputs and results cause memory traffic."""

        def run(*args):
            self._inside = True
            result = function(*args)
            self._inside = False
            for moved in moved_by_piece(function.__name__, tensors_in(args), tensors_in(result)):
                self.add(f"{function.__name__}*", 0, PRODUCTS, moved)
            return result

        return run

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def product_operations(name: str, args: tuple, result: object) -> int:
    """Return the FLOPs of a matrix product or convolution, 0 for anything else."""
    if name in ("mm", "addmm", "bmm"):
        first, second = args[-2:] if name != "addmm" else args[1:3]
        return 2 * first.numel() * second.shape[-1]
    if name == "convolution":
        return 2 * result.numel() * prod(args[1].shape[1:])
    return 0


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size(tensors: Iterable[Tensor]) -> int:
    """Return the size of ``tensors`` in bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def moved_bytes(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Return the bytes a kernel reads and writes."""
    if name == "index_select":
        return 2 * size(outputs)
    if name in ("index_add", "index_add_"):  # a copy, then the rows
        return (0 if name.endswith("_") else 2 * size(outputs)) + 3 * size(inputs[-1:])
    if name.startswith(("zeros", "new_zeros", "fill", "ones")):
        return size(outputs)
    if name == "copy_":  # the previous content is not read
        return size(inputs[1:]) + size(outputs)
    return size({id(x): x for x in inputs}.values()) + size(outputs)  # ``out=`` may name an input


# Compiled pieces of several kernels: passes over all inputs, and small kernels that finish reductions, as generated by
# inductor and Triton of torch 2.15 for sm_90.
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
    """Make the stand-in of the fused attention kernel report its FLOPs to ``roofline``."""

    class Counted(memory._FusedAttention):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.operations = 4 * q.numel() * q.shape[-2]
            roofline.add("attention", ctx.operations, ATTENTION, 4 * q.numel() * q.element_size())
            return memory_attention.forward(ctx, q, k, v)

        @staticmethod
        def backward(ctx, gradient):
            moved = 8 * gradient.numel() * gradient.element_size()
            roofline.add("attention", ctx.operations * 5 // 2, ATTENTION, moved)  # the scores are recomputed
            return memory_attention.backward(ctx, gradient)

    memory_attention, memory._FusedAttention = memory._FusedAttention, Counted
    try:
        yield
    finally:
        memory._FusedAttention = memory_attention


def predict(cfg, compiled: bool = False) -> tuple[Roofline, float, float]:
    """Return the kernels of a step, the seconds of the optimizer and the teacher update, and the MFU."""
    roofline = Roofline()
    with counting_attention(roofline):
        memory.measure_step(cfg, inside=roofline, compiler=roofline.as_kernels if compiled else None)
    update = OPTIMIZER_BYTES * sum(p.numel() for p in student_of(cfg).parameters()) / BYTES
    return roofline, update, step_operations(cfg) / PEAK_FLOPS["H100"] / (roofline.total + update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_write_option(parser)
    args = parser.parse_args()
    rows = []
    for arch, batch_size, compiled in ((*model, compiled) for model in MODELS for compiled in (False, True)):
        cfg = config(f"student.arch={arch}", batch_size)
        roofline, update, mfu = predict(cfg, compiled)
        products, attention = (1e3 * roofline.seconds[kind] for kind in ("products", "attention"))
        others = Counter({k: s for k, s in roofline.seconds.items() if k not in ("products", "attention")})
        total = 1e3 * (roofline.total + update)
        largest = ", ".join(f"{kind} {1e3 * seconds:.0f}" for kind, seconds in others.most_common(6))
        times = [products, attention, 1e3 * others.total(), 1e3 * update, total]
        speed = f"{1e3 * batch_size / total:,.0f}"
        rows.append(
            [
                arch,
                batch_size,
                "on" if compiled else "off",
                roofline.kernels,
                *(f"{x:.0f}" for x in times),
                speed,
                f"{mfu:.0%}",
                largest,
            ]
        )
    header = [
        "model",
        "batch",
        "compile",
        "kernels",
        "products",
        "attention",
        "other kernels",
        "AdamW and teacher",
        "a step",
    ]
    header += ["images/s", "MFU", "largest others"]
    page = (
        "# What bounds a step on an H100: predicted, not measured\n\n"
        f"{describe('benchmarks.roofline')}\n"
        f"Milliseconds. {benchmark_rates()} *compile* off: each operator is a kernel; on (`train.compile=on`): each "
        "piece between products is one, marked *, or as many as torch 2.15's inductor makes of it for an H100.\n\n"
        f"{table(header, rows)}"
    )
    finish(page, "roofline", args.write)


def benchmark_rates() -> str:
    return (
        f"16-bit products at {PRODUCTS / 1e12:.0f} TFLOP/s, attention at {ATTENTION / 1e12:.0f}, memory at "
        f"{BYTES / 1e12:.2f} TB/s, {LAUNCH * 1e6:.0f} us a kernel at least: assumed shares of the data sheet."
    )


if __name__ == "__main__":
    main()
