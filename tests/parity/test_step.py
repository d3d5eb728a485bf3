"""One training step: every loss term and every gradient equal upstream's, in fp32, from the same weights and batch."""

from __future__ import annotations

import pytest

from tests.parity.cases import STEP_CASES
from tests.parity.pair import compare_step

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_losses_and_gradients_equal_upstream(oracle, case, tmp_path):
    errors = compare_step(oracle, case, str(tmp_path))
    losses = {name: error for name, error in errors.losses.items() if not error < LOSS_TOLERANCE}
    gradients = {name: error for name, error in errors.gradients.items() if not error < GRADIENT_TOLERANCE}
    assert not losses, losses
    assert not gradients, gradients
