"""Losses of decoders as sums over objects or pixels.

A sum is divided by the number of objects or pixels of the whole step, so that the loss does not depend on how a step
is divided into processes and accumulated batches. The terms of RF-DETR are those of transformers, whose own loss
function takes the mean in each batch, and in evaluation divides the queries into the groups of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom.decoder.instances import IGNORE


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the sum over labelled pixels."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")


def count(labels: Any) -> int:
    """Return the number of labelled pixels (B, H, W), or of the objects of a list of images."""
    if isinstance(labels, Tensor):
        return int((labels != IGNORE).sum())
    return sum(len(one["class_labels"]) for one in labels)


def set_loss(model: nn.Module, smoothing: float) -> None:
    """Let an RF-DETR compute the sum over objects as its ``loss``.

    Args:
        smoothing: share ``s`` of label smoothing. The class loss is ``(1 - s)`` times that of transformers, plus ``s``
            times the binary cross-entropy with 0.5 of all classes of the queries that have an object.
    """
    model.loss_function = partial(_instances if hasattr(model, "segmentation_head") else _boxes, smoothing)


def _boxes(
    smoothing: float,
    logits: Tensor,
    labels: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    boxes: Tensor,
    config: Any,
    all_logits: Tensor,
    all_boxes: Tensor,
    first_logits: Tensor,
    first_boxes: Tensor,
) -> tuple[Tensor, dict[str, Tensor], None]:
    """Compute transformers' ``loss_function`` of RfDetrForObjectDetection."""
    from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

    matcher = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    arguments = (matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"], config.group_detr)
    levels = [(logits, boxes), *zip(all_logits[:-1], all_boxes[:-1], strict=True), (first_logits, first_boxes)]
    return _sum(_smoothed(LwDetrImageLoss, smoothing)(*arguments), levels, labels, config)


def _instances(
    smoothing: float,
    logits: Tensor,
    labels: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    boxes: Tensor,
    masks: Tensor,
    config: Any,
    all_logits: Tensor,
    all_boxes: Tensor,
    all_masks: Sequence[Tensor],
    first_logits: Tensor,
    first_boxes: Tensor,
    first_masks: Tensor,
) -> tuple[Tensor, dict[str, Tensor], None]:
    """Compute transformers' ``loss_function`` of RfDetrForInstanceSegmentation."""
    from transformers.loss.loss_rf_detr import RfDetrHungarianMatcher, RfDetrImageLoss

    points, costs = config.mask_point_sample_ratio, (config.class_cost, config.bbox_cost, config.giou_cost)
    weights = (config.mask_class_loss_coefficient, config.mask_dice_loss_coefficient)
    matcher = RfDetrHungarianMatcher(*costs, points, *weights)
    names = ["labels", "boxes", "masks"]
    arguments = (matcher, config.num_labels, config.focal_alpha, names, config.group_detr, points)
    between = zip(all_logits[:-1], all_boxes[:-1], all_masks[:-1], strict=True)
    levels = [(logits, boxes, masks), *between, (first_logits, first_boxes, first_masks)]
    return _sum(_smoothed(RfDetrImageLoss, smoothing)(*arguments), levels, labels, config)


def _smoothed(criterion: type, smoothing: float) -> type:
    if not smoothing:
        return criterion

    class Smoothed(criterion):
        """Label smoothing of the class loss; see :func:`set_loss`."""

        def loss_labels(self, outputs, targets, indices, num_boxes):
            (value,) = super().loss_labels(outputs, targets, indices, num_boxes).values()
            matched = [logits[queries] for logits, (queries, _) in zip(outputs["logits"], indices, strict=True)]
            logits = torch.cat(matched)
            even = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 0.5), reduction="sum")
            return {"loss_ce": (1 - smoothing) * value + smoothing * even / num_boxes}

    return Smoothed


def _sum(
    criterion: Any, levels: Sequence[tuple[Tensor, ...]], labels: Sequence[Mapping[str, Tensor]], config: Any
) -> tuple[Tensor, dict[str, Tensor], None]:
    """Return the weighted sum of all terms of all levels (last layer, other layers, encoder), and the terms.

    In training, the mean over the groups of queries.
    """
    groups = levels[0][0].shape[1] // config.num_queries
    weights = {
        "loss_ce": config.class_loss_coefficient,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
        "loss_mask_ce": config.mask_class_loss_coefficient,
        "loss_mask_dice": config.mask_dice_loss_coefficient,
    }
    terms = dict.fromkeys(weights, 0.0)
    with torch.autocast(levels[0][0].device.type, enabled=False):
        for level in levels:
            outputs = dict(zip(("logits", "pred_boxes", "pred_masks"), (one.float() for one in level), strict=False))
            indices = criterion.matcher(outputs, labels, groups)
            for name in criterion.losses:
                for term, value in criterion.get_loss(name, outputs, labels, indices, groups).items():
                    terms[term] = terms[term] + value.sum()
            if len(level) > 2 and not count(labels):  # transformers' terms of masks are then no function of them
                terms["loss_mask_ce"] = terms["loss_mask_ce"] + 0 * outputs["pred_masks"].sum()
    terms = {term: value for term, value in terms.items() if isinstance(value, Tensor)}
    return sum(weights[term] * value for term, value in terms.items()), terms, None
