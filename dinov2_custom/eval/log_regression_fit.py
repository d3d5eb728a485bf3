"""Logistic regressions on features in memory: one fit, and a sweep over regularization strengths. Upstream's names.

``log_regression.py`` has the features, ``log_regression_solvers.py`` the solvers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.eval.log_regression_solvers import fit
from dinov2_custom.eval.metrics import MetricCollection, MetricType, build_metric
from dinov2_custom.logging import track
from dinov2_custom.utils.transfer import to_device

logger = logging.getLogger("dinov2")
DEFAULT_MAX_ITER = 1000
C_POWER_RANGE = torch.linspace(-6, 5, 45)
_CPU = torch.device("cpu")
Batches = Iterable[tuple[Tensor, Tensor]]


class LogRegModule(nn.Module):
    """A logistic regression with inverse regularization strength ``C``; computes in ``dtype`` on ``device``.

    Args:
        num_classes: None for the largest label + 1.
        solver: ``torch`` or ``sklearn``.
    """

    def __init__(
        self,
        C: float,
        max_iter: int = DEFAULT_MAX_ITER,
        dtype: torch.dtype = torch.float64,
        device: torch.device = _CPU,
        *,
        num_classes: int | None = None,
        solver: str = "torch",
    ) -> None:
        super().__init__()
        self.C, self.max_iter, self.dtype, self.device = float(C), max_iter, dtype, device
        self.num_classes, self.solver = num_classes, solver
        self.solution: tuple[Tensor, Tensor] | None = None

    def fit(self, train_features: Tensor, train_labels: Tensor) -> None:
        """Fit to features (N, D) and labels (N,); start from :attr:`solution` if it is set and has this size."""
        features = train_features.to(self.device, self.dtype)
        labels = train_labels.to(self.device).long()
        num_classes = self.num_classes or int(labels.max()) + 1
        self.solution = fit(
            features, labels, self.C, self.max_iter, num_classes, solver=self.solver, start=self.solution
        )

    def forward(self, samples: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return ``{"preds": probabilities (B, C), "target": targets}``."""
        weight, bias = self.solution
        logits = torch.addmm(bias, samples.to(self.device, self.dtype), weight.T)
        return {"preds": logits.softmax(dim=1), "target": targets}


def evaluate_model(
    *, logreg_model: LogRegModule, logreg_metric: MetricCollection, test_data_loader: Batches, device: torch.device
) -> dict[str, Tensor]:
    """Return the accuracies (0..1) of a fitted model on batches of features and labels."""
    logreg_metric.to(device)
    for features, labels in test_data_loader:
        logreg_metric.update(**logreg_model(to_device(features, device), to_device(labels, device)))
    return {name: value.cpu() for name, value in logreg_metric.compute().items()}  # gathered over processes


def train_for_C(
    *,
    C: float,
    max_iter: int,
    train_features: Tensor,
    train_labels: Tensor,
    dtype: torch.dtype = torch.float64,
    device: torch.device = _CPU,
    num_classes: int | None = None,
    solver: str = "torch",
) -> LogRegModule:
    """Fit one regression."""
    model = LogRegModule(C, max_iter, dtype, device, num_classes=num_classes, solver=solver)
    model.fit(train_features, train_labels)
    return model


def train_and_evaluate(
    *,
    C: float,
    max_iter: int,
    train_features: Tensor,
    train_labels: Tensor,
    logreg_metric: MetricCollection,
    test_data_loader: Batches,
    train_dtype: torch.dtype = torch.float64,
    train_features_device: torch.device,
    eval_device: torch.device,
    num_classes: int | None = None,
    solver: str = "torch",
) -> dict[str, Tensor]:
    """Fit one regression and return its accuracies."""
    model = train_for_C(
        C=C,
        max_iter=max_iter,
        train_features=train_features,
        train_labels=train_labels,
        dtype=train_dtype,
        device=train_features_device,
        num_classes=num_classes,
        solver=solver,
    )
    return evaluate_model(
        logreg_model=model, logreg_metric=logreg_metric, test_data_loader=test_data_loader, device=eval_device
    )


def sweep_C_values(  # noqa: N802 - upstream's name
    *,
    train_features: Tensor,
    train_labels: Tensor,
    test_data_loader: Batches,
    metric_type: MetricType,
    num_classes: int,
    train_dtype: torch.dtype = torch.float64,
    train_features_device: torch.device = _CPU,
    max_train_iters: int = DEFAULT_MAX_ITER,
    solver: str = "torch",
) -> tuple[dict[str, Tensor], float]:
    """Return the accuracies and C of the regression with the best top-1, the most regularized one on ties.

    The values of C are distributed over the processes.
    """
    rank, size = distributed.get_global_rank(), distributed.get_global_size()
    powers = C_POWER_RANGE.double()
    scores: dict[int, dict[str, Tensor]] = {}
    model = LogRegModule(
        1.0, max_train_iters, train_dtype, train_features_device, num_classes=num_classes, solver=solver
    )
    for index in track(range(rank, len(powers), size), "regularization", unit="fit"):
        model.C = float(10.0 ** powers[index])
        model.fit(train_features, train_labels)  # warm start from the solution for the previous C
        metric = build_metric(metric_type, num_classes=num_classes, sync_on_compute=False)
        scores[index] = evaluate_model(
            logreg_model=model,
            logreg_metric=metric,
            test_data_loader=test_data_loader,
            device=train_features_device,
        )
        logger.info(f"C={model.C:.5g} " + text_of(scores[index]))
    for other in distributed.gather_objects(scores):
        scores |= other
    best = max(sorted(scores), key=lambda index: float(scores[index]["top-1"].mean()))
    return scores[best], float(10.0 ** powers[best])


def text_of(scores: dict[str, Tensor]) -> str:
    """Format accuracies for a log line."""
    return " ".join(f"{name}={float(value.mean()):.2%}" for name, value in scores.items())
