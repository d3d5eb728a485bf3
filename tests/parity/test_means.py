"""Padding, recomputation, compilation, groups of views and lean layers, alone and together: still upstream's step."""

from __future__ import annotations

import warnings

import pytest
import torch

from dinov2_custom.train.views import pad_patches
from tests.oracle import OracleTrainer, make_batch
from tests.parity.cases import MEANS_CASES, MEANS_RUN_CASES, ONE_BLOCK
from tests.parity.pair import (
    Means,
    OurTrainer,
    compare_run,
    gradient_errors,
    load_into_ours,
    loss_errors,
    unsettle,
)
from tests.parity.test_run import TOLERANCE
from tests.parity.test_step import GRADIENT_TOLERANCE, LOSS_TOLERANCE

PADDED = [
    Means(1, True, "selective", padded=True),
    Means(1, False, "full", padded=True),
    Means(2, True, "none", padded=True),
    Means(2, False, "selective", padded=True),
    Means(4, True, "full", padded=True),
    Means(4, False, "none", padded=True),
]
RECOMPUTED = [Means(groups, lean, mode) for groups, lean in ((4, True), (1, False)) for mode in ("selective", "full")]
COMPILED = [
    (MEANS_CASES[0], Means(2, True, "full", padded=True, compiler="aot_eager")),
    (MEANS_CASES[1], Means(1, False, "none", compiler="aot_eager")),
]
TEN_STEPS = [
    (MEANS_RUN_CASES[0], Means(2, False, "full", padded=True)),
    (MEANS_RUN_CASES[1], Means(4, True, "selective", padded=True, compiler="aot_eager")),
]
REAL_COMPILER = Means(1, True, padded=True, compiler="inductor")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own: deprecated names, attributes that it reads
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def upstream(oracle):
    """Return a function that returns upstream's trainer after one step of a case, its batch, losses and gradients."""
    done = {}

    def of(case):
        if case.name not in done:
            theirs = OracleTrainer(oracle, case.dotlist(), depth=case.depth)
            unsettle(theirs.model, seed=1)
            weights = {name: value.clone() for name, value in theirs.model.state_dict().items()}
            batch = make_batch(oracle, theirs.cfg, case.batch_size, seed=2)
            done[case.name] = theirs, weights, batch, theirs.forward_backward(batch, teacher_temp=0.05, seed=3)
        return done[case.name]

    return of


def check_step(upstream, case, means, output_dir):
    theirs, weights, batch, expected = upstream(case)
    ours = OurTrainer(case.dotlist(), output_dir, depth=case.depth, means=means)
    load_into_ours(weights, ours.model)
    got = ours.forward_backward(batch, teacher_temp=0.05, seed=3)
    losses = {name: error for name, error in loss_errors(expected, got).items() if not error < LOSS_TOLERANCE}
    errors = gradient_errors(theirs.model.student, ours.model.student)
    gradients = {name: error for name, error in errors.items() if not error < GRADIENT_TOLERANCE}
    assert "koleo_loss" in expected and not losses, losses
    assert not gradients, gradients


@pytest.mark.parametrize("means", [*PADDED, *RECOMPUTED], ids=str)
@pytest.mark.parametrize("case", MEANS_CASES, ids=lambda case: case.name)
def test_losses_and_gradients_equal_upstream(upstream, case, means, tmp_path):
    check_step(upstream, case, means, str(tmp_path))


@pytest.mark.parametrize(("case", "means"), COMPILED, ids=lambda value: getattr(value, "name", str(value)))
def test_compiled_they_equal_upstream_without_graph_breaks(upstream, case, means, tmp_path):
    check_step(upstream, case, means, str(tmp_path))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2


@pytest.mark.parametrize("case", MEANS_CASES, ids=lambda case: case.name)
def test_these_batches_are_padded(upstream, case):
    batch = upstream(case)[2]
    first = int(batch["collated_masks"].chunk(2)[0].sum())
    for apart in (False, True):
        weights = pad_patches(batch, first, apart)[0]["masks_weight"]
        assert (weights == 0).sum() > 0 and len(weights) > len(batch["masks_weight"])


@pytest.mark.parametrize(("case", "means"), TEN_STEPS, ids=lambda value: getattr(value, "name", str(value)))
def test_weights_after_ten_steps_equal_upstream(oracle, case, means, tmp_path):
    errors = compare_run(oracle, case, str(tmp_path), 10, means)
    apart = {name: error for name, error in errors.weights.items() if not error < TOLERANCE}
    relative = {name: error for name, error in errors.relative.items() if not error < TOLERANCE}
    assert not apart and not relative, (apart, relative)
    assert max(errors.moved.values()) > 1e-3


def test_with_the_real_compiler(upstream, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    try:
        torch._inductor.cpp_builder.get_cpp_compiler()
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("needs a C++ compiler")
    check_step(upstream, ONE_BLOCK, REAL_COMPILER, str(tmp_path))
