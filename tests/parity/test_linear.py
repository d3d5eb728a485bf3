"""Inputs, names, rates and scores of the linear classifiers against upstream's own ``eval/linear.py``."""

from __future__ import annotations

import pytest
import torch

from dinov2_custom.eval import linear
from tests.oracle import preserved_rng
from tests.parity.upstream_eval import load_upstream_eval

RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]


class _Here(torch.nn.Module):
    """Ignore upstream's moves of classifiers to the GPU."""

    def cuda(self):
        return self


@pytest.fixture
def upstream(oracle, monkeypatch):
    module = load_upstream_eval(monkeypatch, "linear")
    module.LinearClassifier.cuda = _Here.cuda
    return module


def tokens():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 6, 8, generator=generator), torch.randn(3, 8, generator=generator)) for _ in range(4)]


@pytest.mark.parametrize("avgpool", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_inputs_equal_upstreams(upstream, blocks, avgpool):
    expected = upstream.create_linear_input(tokens(), blocks, avgpool)
    torch.testing.assert_close(linear.create_linear_input(tokens(), blocks, avgpool), expected)


@pytest.mark.parametrize(("batch_size", "upstreams"), [(1024, 52), (128, 48), (32, 44), (8, 40)])
def test_names_and_rates_equal_upstreams_where_those_are_distinct(upstream, batch_size, upstreams):
    with preserved_rng(0):
        theirs, their_groups = upstream.setup_linear_classifiers(tokens(), [1, 4], RATES, batch_size, 7)
    ours, groups = linear.setup_linear_classifiers(tokens(), [1, 4], RATES, batch_size, 7)
    names = list(theirs.classifiers_dict)
    assert (len(names), len(ours)) == (upstreams, 52)
    assert [group["lr"] for group in groups] == [group["lr"] for group in their_groups]
    all_of_theirs = [
        f"classifier_{n}_blocks_avgpool_{a}_lr_{g['lr']:.5f}".replace(".", "_")
        for (n, a), g in zip([(n, a) for n in (1, 4) for a in (False, True) for _ in RATES], their_groups, strict=True)
    ]
    assert set(all_of_theirs) == set(names)
    for own, name in zip(ours.classifiers_dict, all_of_theirs, strict=True):
        collided = all_of_theirs.count(name) > 1 or name.endswith("_0_00000")
        assert (own == name) != collided


def test_scores_equal_upstreams(upstream):
    with preserved_rng(0):
        theirs, _ = upstream.setup_linear_classifiers(tokens(), [1, 4], RATES, 1024, 7)
    ours, _ = linear.setup_linear_classifiers(tokens(), [1, 4], RATES, 1024, 7)
    ours.load_state_dict(theirs.state_dict(), strict=True)  # the files are compatible
    expected, got = theirs(tokens()), ours(tokens())
    assert list(expected) == list(got)
    for name, scores in expected.items():
        torch.testing.assert_close(got[name], scores)
    mapping, target = [2, 0, 5], torch.tensor([0, 1, 2])
    name = list(expected)[-1]
    first = upstream.LinearPostprocessor(theirs.classifiers_dict[name], torch.tensor(mapping))(tokens(), target)
    second = linear.LinearPostprocessor(ours.classifiers_dict[name], mapping)(tokens(), target)
    torch.testing.assert_close(second["preds"], first["preds"])


def test_rates_scale_as_upstreams(upstream):
    for batch_size in (1, 8, 128):
        assert linear.scale_lr(0.1, batch_size) == upstream.scale_lr(0.1, batch_size)
