"""Twenty optimizer steps: after schedules, clipping, AdamW and EMA, every weight of both networks equals upstream's."""

from __future__ import annotations

import pytest

from tests.parity.cases import RUN_CASES
from tests.parity.pair import compare_run

STEPS = 20
TOLERANCE = 1e-4


@pytest.mark.parametrize("case", RUN_CASES, ids=lambda case: case.name)
def test_weights_after_twenty_steps_equal_upstream(oracle, case, tmp_path):
    errors = compare_run(oracle, case, str(tmp_path), STEPS)
    apart = {name: error for name, error in errors.weights.items() if not error < TOLERANCE}
    assert not apart, apart
    relative = {name: error for name, error in errors.relative.items() if not error < TOLERANCE}
    assert not relative, relative
    trained = [name for name in errors.moved if name.startswith(("student.", "teacher."))]
    unmoved = {name: errors.moved[name] for name in trained if errors.moved[name] < 3 * errors.weights[name]}
    assert trained and not unmoved, unmoved
