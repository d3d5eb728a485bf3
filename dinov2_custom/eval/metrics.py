"""Top-k accuracies as torchmetrics, averaged over samples or over classes. Upstream's names.

``update`` never waits for the device; ``compute`` adds up the counts of all processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from dinov2_custom.eval.args import AccuracyAveraging, MetricType


class TopKAccuracy(Metric):
    """Fraction of samples whose label is among the ``top_k`` highest scores; ``top_k`` is cut to the number of classes.

    torchmetrics' ``MulticlassAccuracy`` is not used: its update synchronises with the device, and its macro average
    counts a class that never occurs as 0 if it was predicted.

    Args:
        average: over samples (micro), over the classes that occur (macro), or one value per class (none; 0 if a class
            does not occur).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, average: AccuracyAveraging, num_classes: int, top_k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.average = average
        self.top_k = min(top_k, num_classes)
        self.add_state("correct", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count scores (B, C) against labels (B,) in 0..C-1."""
        best = preds.topk(self.top_k, dim=1).indices
        hit = (best == target[:, None]).any(dim=1).long()
        # not in place: tensors made in inference mode cannot be modified outside it
        self.correct = self.correct.index_add(0, target, hit)
        self.seen = self.seen.index_add(0, target, torch.ones_like(hit))

    def compute(self) -> Tensor:
        """Return the accuracy in 0..1: a scalar, or (C,) for ``none``."""
        correct, seen = self.correct.cpu().double(), self.seen.cpu().double()
        if self.average is AccuracyAveraging.MEAN_ACCURACY:
            return correct.sum() / seen.sum().clamp(min=1)
        by_class = correct / seen.clamp(min=1)
        if self.average is AccuracyAveraging.PER_CLASS_ACCURACY:
            return by_class
        return by_class[seen > 0].mean()


class ImageNetReaLAccuracy(Metric):
    """Fraction of samples for which one of the ``top_k`` highest scores is among several true labels.

    Source: Beyer et al. 2020 (ReaL labels).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, num_classes: int, top_k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.top_k = min(top_k, num_classes)
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count scores (B, C) against labels (B, A), padded with -1; samples without labels are ignored."""
        best = preds.topk(self.top_k, dim=1).indices
        labelled = (target >= 0).any(dim=1)
        hit = (best[:, :, None] == target[:, None, :]).any(dim=2).any(dim=1)
        self.correct = self.correct + (hit & labelled).sum()
        self.seen = self.seen + labelled.sum()

    def compute(self) -> Tensor:
        """Return the accuracy in 0..1, a scalar."""
        return self.correct.cpu().double() / self.seen.cpu().clamp(min=1)


def build_metric(
    metric_type: MetricType, *, num_classes: int, ks: tuple[int, ...] | None = None, **kwargs: Any
) -> MetricCollection:
    """Return the metrics ``top-<k>`` for each of ``ks`` (1 and 5); ``kwargs`` are passed to each of them."""
    ks = ks or (1, 5)
    if metric_type.accuracy_averaging is None:
        return build_topk_imagenet_real_accuracy_metric(num_classes, ks, **kwargs)
    return build_topk_accuracy_metric(metric_type.accuracy_averaging, num_classes, ks, **kwargs)


def build_topk_accuracy_metric(
    average_type: AccuracyAveraging, num_classes: int, ks: tuple[int, ...] = (1, 5), **kwargs: Any
) -> MetricCollection:
    return _collect({f"top-{k}": TopKAccuracy(average_type, int(num_classes), k, **kwargs) for k in ks})


def build_topk_imagenet_real_accuracy_metric(
    num_classes: int, ks: tuple[int, ...] = (1, 5), **kwargs: Any
) -> MetricCollection:
    return _collect({f"top-{k}": ImageNetReaLAccuracy(int(num_classes), k, **kwargs) for k in ks})


def _collect(metrics: dict[str, Metric]) -> MetricCollection:
    # compute groups are formed of metrics that agree on the first batch: top-1 and top-5 may, and differ later
    return MetricCollection(metrics, compute_groups=False)
