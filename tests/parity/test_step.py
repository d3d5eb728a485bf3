"""One training step: every loss term and every gradient equal upstream's, in fp32, from the same weights and batch."""

from __future__ import annotations

import pytest

from tests.parity.cases import STEP_CASES
from tests.parity.pair import OPTIMISED, PLAIN, compare_step

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


# every case with all optimisations, and two also without any
UNOPTIMISED = ("S/14 no KoLeo", "S/14 sinkhorn, shared head, drop path .05")
CASES = [(case, OPTIMISED) for case in STEP_CASES] + [(case, PLAIN) for case in STEP_CASES if case.name in UNOPTIMISED]


@pytest.mark.parametrize(("case", "means"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_losses_and_gradients_equal_upstream(oracle, case, means, tmp_path):
    errors = compare_step(oracle, case, str(tmp_path), means)
    losses = {name: error for name, error in errors.losses.items() if not error < LOSS_TOLERANCE}
    gradients = {name: error for name, error in errors.gradients.items() if not error < GRADIENT_TOLERANCE}
    assert not losses, losses
    assert not gradients, gradients
