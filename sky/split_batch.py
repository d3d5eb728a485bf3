"""Split a global batch over any number of GPUs: images per GPU and step, and batches accumulated for one step.

The global batch decides the learning rate, the length of an epoch and which images a step sees, so it has to stay what
it is when a job comes back on another number of GPUs. Prints the two overrides for ``run/train/train.py``. Needs only
Python. Read :func:`split` first.
"""

from __future__ import annotations

import argparse
import sys


def split(global_batch: int, processes: int, at_most: int) -> tuple[int, int]:
    """Return (images per process, accumulated batches): their product with ``processes`` is ``global_batch``.

    The batch per process is the largest that is not above ``at_most``.

    Raises:
        ValueError: there is none; says which numbers of processes and which global batches would do.
    """
    if min(global_batch, processes, at_most) < 1:
        raise ValueError(
            "expected a global batch, a number of GPUs and a largest batch per GPU of at least 1, got "
            f"{global_batch}, {processes} and {at_most}"
        )
    if global_batch % processes:
        near = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
        fits = [max(n for n in near if n < processes), *[n for n in near if n > processes][:1]]
        lower = global_batch // processes * processes
        batches = " or ".join(f"{n:,}" for n in (lower, lower + processes) if n)
        raise ValueError(
            f"expected a number of GPUs that divides the global batch of {global_batch:,}, got {processes}; take "
            f"{' or '.join(map(str, fits))} GPUs, or for a new run GLOBAL_BATCH={batches}"
        )
    share = global_batch // processes
    per_process = max(n for n in range(1, min(share, at_most) + 1) if share % n == 0)
    return per_process, share // per_process


def main(arguments: list[str] | None = None) -> int:
    """Print the overrides, or one line of error; return the exit code."""
    parser = argparse.ArgumentParser(description="Print the overrides that give a global batch on so many GPUs.")
    parser.add_argument("--global-batch", type=int, required=True, metavar="N", help="images of one optimizer step")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs (processes) of all nodes together")
    parser.add_argument("--at-most", type=int, required=True, metavar="N", help="images that fit on one GPU")
    args = parser.parse_args(arguments)
    try:
        per_process, accumulated = split(args.global_batch, args.gpus, args.at_most)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f"train.batch_size_per_gpu={per_process} optim.accumulation_steps={accumulated}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
