"""kNN scores against upstream's own ``KnnModule``, in a real process group of one (it gathers over ranks always)."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dinov2_custom.eval.knn import KnnModule
from tests.oracle import ensure_oracle

NEEDED = ("", ".data", ".data.transforms", ".distributed", ".eval", ".eval.metrics", ".eval.setup", ".eval.utils")


@pytest.fixture
def upstream_knn(oracle, monkeypatch):
    """Upstream's ``eval/knn.py`` alone: what it imports for data, metrics and set-up is not used by the module."""
    for name in NEEDED:
        monkeypatch.setitem(sys.modules, f"dinov2{name}", MagicMock(spec=ModuleType))
        for attribute in ("SamplerType", "make_data_loader", "make_dataset", "make_classification_eval_transform",
                          "AccuracyAveraging", "build_topk_accuracy_metric", "get_args_parser",
                          "setup_and_build_model", "ModelWithNormalize", "evaluate", "extract_features"):  # fmt: skip
            setattr(sys.modules[f"dinov2{name}"], attribute, MagicMock())
    ranks = sys.modules["dinov2.distributed"]
    ranks.get_global_rank, ranks.get_global_size = (lambda: 0), (lambda: 1)
    sys.modules["dinov2"].distributed = ranks
    spec = importlib.util.spec_from_file_location("upstream_knn", ensure_oracle() / "dinov2" / "eval" / "knn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
