from __future__ import annotations

import pytest
import torch

from dinov2_custom.eval.metrics import AccuracyAveraging, MetricType, TopKAccuracy, build_metric

SCORES = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.3, 0.3, 0.4], [0.6, 0.3, 0.1]])
LABELS = torch.tensor([1, 2, 0, 0])


@pytest.mark.parametrize(
    "metric_type, expected",
    [
        (MetricType.MEAN_ACCURACY, 2 / 4),
        (MetricType.MEAN_PER_CLASS_ACCURACY, (1 / 2 + 1 + 0) / 3),
        (MetricType.PER_CLASS_ACCURACY, [1 / 2, 1.0, 0.0]),
    ],
)
def test_top1(metric_type, expected):
    metric = build_metric(metric_type, num_classes=3, ks=(1,))
    metric.update(SCORES[:3], LABELS[:3])
    metric.update(SCORES[3:], LABELS[3:])
    torch.testing.assert_close(metric.compute()["top-1"], torch.tensor(expected, dtype=torch.float64))


def test_top_k_counts_the_runner_up():
    metric = TopKAccuracy(AccuracyAveraging.MEAN_ACCURACY, num_classes=3, top_k=2)
    metric.update(SCORES[:2], LABELS[:2])
    assert float(metric.compute()) == 1.0


def test_top5_of_three_classes_is_top3():
    metric = build_metric(MetricType.MEAN_ACCURACY, num_classes=3)
    metric.update(SCORES, LABELS)
    assert float(metric.compute()["top-5"]) == 1.0


def test_a_class_that_never_occurs_leaves_the_mean_alone():
    metric = TopKAccuracy(AccuracyAveraging.MEAN_PER_CLASS_ACCURACY, num_classes=9, top_k=1)
    metric.update(torch.eye(9)[[1, 0]], torch.tensor([1, 2]))
    assert float(metric.compute()) == 0.5


def test_real_labels():
    metric = build_metric(MetricType.IMAGENET_REAL_ACCURACY, num_classes=3, ks=(1, 2))
    metric.update(SCORES, torch.tensor([[2, 1], [2, -1], [-1, -1], [1, -1]]))  # the third has no label
    assert {name: round(float(value), 4) for name, value in metric.compute().items()} == {"top-1": 0.3333, "top-2": 1.0}


def test_top1_and_top5_stay_apart_after_a_batch_in_which_they_agree():
    metric = build_metric(MetricType.MEAN_ACCURACY, num_classes=3, ks=(1, 2))
    metric.update(SCORES[:1], LABELS[:1])
    metric.update(SCORES[1:2], LABELS[1:2])  # the runner-up
    assert {name: float(value) for name, value in metric.compute().items()} == {"top-1": 0.5, "top-2": 1.0}


def test_update_never_waits_for_the_device():
    """Meta tensors have no values: reading one raises."""
    for metric_type, target in (("mean_accuracy", (4,)), ("imagenet_real_accuracy", (4, 2))):
        metric = build_metric(MetricType(metric_type), num_classes=3).to("meta")
        metric.update(torch.empty(4, 3, device="meta"), torch.empty(target, dtype=torch.long, device="meta"))
