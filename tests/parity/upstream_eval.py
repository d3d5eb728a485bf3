"""Load one of upstream's evaluation modules, with its imports for data, metrics and set-up replaced by mocks."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock

from tests.oracle import ensure_oracle

NEEDED = ("", ".data", ".data.transforms", ".distributed", ".eval", ".eval.metrics", ".eval.setup", ".eval.utils",
          ".logging")  # fmt: skip
ATTRIBUTES = ("SamplerType", "make_data_loader", "make_dataset", "make_classification_eval_transform",
              "make_classification_train_transform", "AccuracyAveraging", "MetricType", "MetricLogger", "build_metric",
              "build_topk_accuracy_metric", "get_args_parser", "setup_and_build_model", "ModelWithNormalize",
              "ModelWithIntermediateLayers", "evaluate", "extract_features", "Checkpointer",
              "PeriodicCheckpointer")  # fmt: skip


def load_upstream_eval(monkeypatch, name: str) -> ModuleType:
    """Return upstream's ``eval/<name>.py``, as if on rank 0 of 1."""
    needed = [f"dinov2{part}" for part in NEEDED] + ["fvcore", "fvcore.common", "fvcore.common.checkpoint"]
    for module in needed:
        monkeypatch.setitem(sys.modules, module, MagicMock(spec=ModuleType))
        for attribute in ATTRIBUTES:
            setattr(sys.modules[module], attribute, MagicMock())
    ranks = sys.modules["dinov2.distributed"]
    ranks.get_global_rank, ranks.get_global_size, ranks.is_enabled = (lambda: 0), (lambda: 1), (lambda: False)
    sys.modules["dinov2"].distributed = ranks
    spec = importlib.util.spec_from_file_location(
        f"upstream_{name}", ensure_oracle() / "dinov2" / "eval" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
