"""Top-k accuracies, averaged over samples or over classes. No torchmetrics needed.

Not the classifiers. Read :class:`TopKAccuracy` first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_custom import distributed
from dinov2_custom.eval.args import AccuracyAveraging, MetricType
from dinov2_custom.utils.transfer import to_device


class TopKAccuracy:
    """Share of samples whose label is among the ``top_k`` highest scores; ``top_k`` is cut to the number of classes.

    Args:
        average: over samples (micro), over the classes that occur (macro), or one value a class (none; 0 where a class
            does not occur).
    """

    def __init__(self, average: AccuracyAveraging, num_classes: int, top_k: int) -> None:
        self.average = average
        self.top_k = min(top_k, num_classes)
        self.correct = torch.zeros(num_classes, dtype=torch.float64)
        self.seen = torch.zeros(num_classes, dtype=torch.float64)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count scores (B, C) against labels (B,) in 0..C-1."""
        best = preds.topk(self.top_k, dim=1).indices
        hit = (best == target[:, None]).any(dim=1).double()
        # counted where the scores are, so that the host waits for the device at the end only
        self.correct, self.seen = to_device(self.correct, hit.device), to_device(self.seen, hit.device)
        self.correct.index_add_(0, target, hit)
        self.seen.index_add_(0, target, torch.ones_like(hit))

    def all_reduce(self) -> None:
        """Add up the counts of all processes."""
        self.correct, self.seen = _sum_over_processes(torch.stack([self.correct, self.seen]))

    def compute(self) -> Tensor:
        """Return the accuracy in 0..1: a scalar, or (C,) for ``none``."""
        if self.average is AccuracyAveraging.MEAN_ACCURACY:
            return self.correct.sum() / self.seen.sum().clamp(min=1)
        by_class = self.correct / self.seen.clamp(min=1)
        if self.average is AccuracyAveraging.PER_CLASS_ACCURACY:
            return by_class
        return by_class[self.seen > 0].mean()


class ImageNetReaLAccuracy:
    """Share of samples of which one of the ``top_k`` highest scores is among several true labels.

    ``kwargs`` are accepted as upstream does, and not used.

    Source: Beyer et al. 2020 (ReaL labels).
    """

    def __init__(self, num_classes: int, top_k: int = 1, **kwargs: Any) -> None:
        self.top_k = min(top_k, num_classes)
        self.counts = torch.zeros(2, dtype=torch.float64)  # correct, seen

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count scores (B, C) against labels (B, A), padded by -1; samples without any label do not count."""
        best = preds.topk(self.top_k, dim=1).indices
        labelled = (target >= 0).any(dim=1)
        hit = (best[:, :, None] == target[:, None, :]).any(dim=2).any(dim=1)
        self.counts = to_device(self.counts, hit.device) + torch.stack([(hit & labelled).sum(), labelled.sum()])

    def all_reduce(self) -> None:
        """Add up the counts of all processes."""
        self.counts = _sum_over_processes(self.counts)

    def compute(self) -> Tensor:
        """Return the accuracy in 0..1, a scalar."""
        return self.counts[0] / self.counts[1].clamp(min=1)


class MetricCollection:
    """Metrics by name that see the same predictions."""

    def __init__(self, metrics: dict[str, TopKAccuracy | ImageNetReaLAccuracy]) -> None:
        self.metrics = metrics

    def update(self, preds: Tensor, target: Tensor) -> None:
        for metric in self.metrics.values():
            metric.update(preds, target)

    def all_reduce(self) -> None:
        """Add up the counts of all processes; before that :meth:`compute` is this process's own."""
        for metric in self.metrics.values():
            metric.all_reduce()

    def compute(self) -> dict[str, Tensor]:
        return {name: metric.compute() for name, metric in self.metrics.items()}


def _sum_over_processes(counts: Tensor) -> Tensor:
    on_gpu = distributed.is_enabled() and dist.get_backend() == "nccl"
    return distributed.all_reduce(counts.cuda() if on_gpu else counts).cpu()


def build_metric(metric_type: MetricType, *, num_classes: int, ks: tuple[int, ...] | None = None) -> MetricCollection:
    """Return the metrics ``top-<k>`` for each of ``ks`` (1 and 5)."""
    ks = ks or (1, 5)
    if metric_type.accuracy_averaging is None:
        return build_topk_imagenet_real_accuracy_metric(num_classes, ks)
    return build_topk_accuracy_metric(metric_type.accuracy_averaging, num_classes, ks)


def build_topk_accuracy_metric(
    average_type: AccuracyAveraging, num_classes: int, ks: tuple[int, ...] = (1, 5)
) -> MetricCollection:
    return MetricCollection({f"top-{k}": TopKAccuracy(average_type, num_classes, k) for k in ks})


def build_topk_imagenet_real_accuracy_metric(num_classes: int, ks: tuple[int, ...] = (1, 5)) -> MetricCollection:
    return MetricCollection({f"top-{k}": ImageNetReaLAccuracy(num_classes, k) for k in ks})
