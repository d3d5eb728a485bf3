"""Predict what bounds a training step on an H100, kernel by kernel, by the model of ``dinov2_custom/plan/roofline.py``.

``benchmarks.gpu`` measures. ``python -m benchmarks.roofline --write`` writes results/roofline.md.
"""

from __future__ import annotations

import argparse

from benchmarks.machine import add_write_option, describe, finish, table
from benchmarks.memory import config, step_operations
from dinov2_custom.plan.roofline import ATTENTION, BYTES, LAUNCH, PRODUCTS, predict
from dinov2_custom.train.gpus import GPUS

H100 = GPUS["H100"]
MODELS = (("vit_small", 64), ("vit_base", 64), ("vit_large", 64), ("vit_large", 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_write_option(parser)
    args = parser.parse_args()
    rows = []
    for arch, batch_size, compiled in ((*model, compiled) for model in MODELS for compiled in (False, True)):
        cfg = config(f"student.arch={arch}", batch_size)
        roofline = predict(cfg, compiled=compiled)
        seconds, update = roofline.seconds(H100), roofline.update_seconds(H100)
        mfu = step_operations(cfg) / H100.flops / (seconds.total() + update)
        products, attention = (1e3 * seconds.pop(kind) for kind in ("products", "attention"))
        total = products + attention + 1e3 * (seconds.total() + update)
        largest = ", ".join(f"{kind} {1e3 * s:.0f}" for kind, s in seconds.most_common(6))
        times = [products, attention, 1e3 * seconds.total(), 1e3 * update, total]
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
    products, attention = PRODUCTS * H100.flops / 1e12, ATTENTION * H100.flops / 1e12
    return (
        f"16-bit products at {products:.0f} TFLOP/s, attention at {attention:.0f}, memory at "
        f"{BYTES * H100.bandwidth / 1e12:.2f} TB/s, {LAUNCH * 1e6:.0f} us a kernel at least: assumed shares of the "
        "data sheet."
    )


if __name__ == "__main__":
    main()
