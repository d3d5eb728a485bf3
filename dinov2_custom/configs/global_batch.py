"""From `optim.global_batch` to the batch of a process and the number of batches whose gradients make a step.

Not how many images fit on a GPU (train/memory.py, which divides what is chosen here). Read `split_global_batch` first.
"""

from collections.abc import Callable
from typing import Any

from dinov2_custom.configs.mistakes import Mistakes

GLOBAL, BATCH, ACCUMULATED = "optim.global_batch", "train.batch_size_per_gpu", "optim.accumulation_steps"


def split_global_batch(
    values: dict[str, Any], where: Callable[[str], str], world_size: int, mistakes: Mistakes
) -> None:
    """Set the two keys that follow from `optim.global_batch`, if that is set: processes x images x batches equal it.

    Overrides of the two are bounds, the most images at once and the fewest batches. In a config file they do not count:
    there they are a recipe's, or those of a run with another number of processes.

    Args:
        values: value of each key by dotted name; changed in place.
        where: names the source of a key's value, such as a file.
    """
    whole = values[GLOBAL]
    if not whole or not mistakes.keys.isdisjoint((GLOBAL, BATCH, ACCUMULATED)):
        return
    share, rest = divmod(whole, world_size)
    if rest:
        divisors = divisors_of(whole)
        fits = [max(n for n in divisors if n < world_size), *[n for n in divisors[::-1] if n > world_size][:1]]
        others = " or ".join(str(n) for n in (whole - rest, whole - rest + world_size) if n)
        fix = f"start {' or '.join(map(str, fits))} processes, or for a new run set {GLOBAL}={others}"
        mistakes.add(f"{GLOBAL} ({where(GLOBAL)})", f"a multiple of the {world_size} processes", str(whole), fix)
        return
    fewest = values[ACCUMULATED] if where(ACCUMULATED) == "override" else 1
    if fewest > share:
        got = f"{fewest} with {GLOBAL} = {whole} in {world_size} processes"
        mistakes.add(f"{ACCUMULATED} (override)", f"at most the {share} images of a process", got)
        return
    most = values[BATCH] if where(BATCH) == "override" else share
    values[BATCH] = next(n for n in divisors_of(share) if n <= min(most, share // fewest))
    values[ACCUMULATED] = share // values[BATCH]


def divisors_of(number: int) -> list[int]:
    """Return all divisors, the largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]
