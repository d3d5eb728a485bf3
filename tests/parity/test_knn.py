"""kNN scores against upstream's own ``KnnModule``, in a real process group of one (it gathers over ranks always)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dinov2_custom.eval.knn import KnnModule
from tests.parity.upstream_eval import load_upstream_eval


@pytest.fixture
def upstream_knn(oracle, monkeypatch):
    module = load_upstream_eval(monkeypatch, "knn")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield module
    dist.destroy_process_group()


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_scores_equal_upstreams(upstream_knn, temperature):
    g = torch.Generator().manual_seed(0)
    train = F.normalize(torch.randn(300, 24, generator=g), dim=-1)
    labels = torch.randint(7, (300,), generator=g)
    queries = F.normalize(torch.randn(40, 24, generator=g), dim=-1)
    ks = [1, 5, 20]
    theirs = upstream_knn.KnnModule(train, labels, ks, temperature, torch.device("cpu"), num_classes=7)(queries)
    ours = KnnModule(train, labels, ks, temperature, num_classes=7)(queries)
    assert set(theirs) == set(ours)
    for k in ks:
        torch.testing.assert_close(ours[k], theirs[k], rtol=1e-5, atol=1e-7)
        assert torch.equal(ours[k].argmax(1), theirs[k].argmax(1))
