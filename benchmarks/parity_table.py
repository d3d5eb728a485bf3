"""Print, as a markdown table, the deviation of our training step from upstream's for every parity test case.

The figures are relative errors in fp32 on a CPU. ``python -m benchmarks.parity_table`` prints the tables of
docs/parity.md; the oracle is fetched on first use.
"""

from __future__ import annotations

import argparse
import tempfile

from tests.oracle import ensure_oracle, load_oracle
from tests.parity.cases import RUN_CASES, STEP_CASES
from tests.parity.pair import compare_run, compare_step

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    only = parser.parse_args().only
    oracle = load_oracle(ensure_oracle())
    with tempfile.TemporaryDirectory() as folder:
        print("| case | depth | batch | worst loss term | worst gradient | of parameter |\n|---|---|---|---|---|---|")
        for case in STEP_CASES:
            if only in case.name:
                print(_step_row(case, compare_step(oracle, case, folder)), flush=True)
        print(
            f"\n| case, {STEPS} steps | worst loss term | student | teacher | student, relative | teacher, relative |"
        )
        print("|---|---|---|---|---|---|")
        for case in RUN_CASES:
            if only in case.name:
                print(_run_row(case, compare_run(oracle, case, folder, STEPS)), flush=True)


def _step_row(case, errors) -> str:
    worst = max(errors.gradients, key=errors.gradients.get)
    cells = [
        case.name,
        case.depth or "all",
        case.batch_size,
        f"{errors.worst_loss:.1e}",
        f"{errors.worst_gradient:.1e}",
    ]
    return "| " + " | ".join(str(cell) for cell in [*cells, f"`{worst}`"]) + " |"


def _run_row(case, errors) -> str:
    def worst(found: dict[str, float], side: str) -> str:
        return f"{max(error for name, error in found.items() if name.startswith(side)):.1e}"

    cells = [case.name, f"{max(errors.losses.values()):.1e}"]
    cells += [worst(found, side) for found in (errors.weights, errors.relative) for side in ("student.", "teacher.")]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
