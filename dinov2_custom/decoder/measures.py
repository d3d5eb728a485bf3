"""COCO's average precision, the mean intersection over union, and bootstrap intervals of their differences.

Predictions are COCO results: ``image_id`` is the number of the image in the split and ``category_id`` the number of the
class, both from 0; ``bbox`` or ``segmentation`` (run lengths as pycocotools encodes them), and ``score``.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinov2_custom.errors import DataError, optional
from dinov2_custom.utils.rng import seed_for

from .instances import IGNORE, Split, encode_outline

KINDS = ("bbox", "segm", "semantic")
RESAMPLES = 1000
RECALLS = np.linspace(0, 1, 101)
AT_50, AREA_ALL = 0, 0  # positions in pycocotools' thresholds and areas
LARGEST = 2**24  # numbers held at once by the bootstrap


def coco_scores(split: Split, predictions: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return COCO's average precisions of boxes ("bbox") or masks ("segm").

    ``ap`` is the mean over IoU thresholds 0.5 to 0.95 and classes; ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``,
    ``ap_large`` as in COCO; ``per_class`` has the ``ap`` of each class, in the order of ``split.classes``. None where
    there is no ground truth. Crowds are ignored, as in COCO.

    Raises:
        DataError: pycocotools is missing, or a prediction has an unknown image or class.
    """
    found = _evaluate(split, predictions, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        found.accumulate()
    precision = found.eval["precision"]  # (thresholds, recalls, classes, areas, maximal numbers of detections)

    def mean(values: np.ndarray) -> float | None:
        values = values[values > -1]  # pycocotools' mark for classes without ground truth
        return float(values.mean()) if values.size else None

    scores = {"ap": mean(precision[:, :, :, 0, -1]), "ap50": mean(precision[0, :, :, 0, -1])}
    scores["ap75"] = mean(precision[5, :, :, 0, -1])
    for at, name in enumerate(("small", "medium", "large"), start=1):
        scores[f"ap_{name}"] = mean(precision[:, :, :, at, -1])
    return scores | {"per_class": [mean(precision[:, :, at, 0, -1]) for at in range(len(split.classes))]}


def _evaluate(split: Split, predictions: Sequence[dict[str, Any]], kind: str) -> Any:
    """Return pycocotools' evaluation with all predictions matched to the ground truth."""
    coco = optional("pycocotools.coco", "average precision", DataError)
    cocoeval = optional("pycocotools.cocoeval", "average precision", DataError)
    images = [{"id": at, "width": one.width, "height": one.height} for at, one in enumerate(split.images)]
    categories = [{"id": at, "name": name} for at, name in enumerate(split.classes)]
    labels = []
    for at, image in enumerate(split.images):
        for one in image.instances:
            label = {"id": len(labels) + 1, "image_id": at, "category_id": one.category, "bbox": list(one.box)}
            label |= {"area": one.area, "iscrowd": int(one.crowd)}
            if kind == "segm":
                label["segmentation"] = _outline(one.segmentation, image.width, image.height)
            labels.append(label)
    results = [_result(one, number, split, kind) for number, one in enumerate(predictions, start=1)]
    with contextlib.redirect_stdout(io.StringIO()):
        tables = []
        for annotations in (labels, results):
            table = coco.COCO()
            table.dataset = {"images": images, "categories": categories, "annotations": annotations}
            table.createIndex()
            tables.append(table)
        found = cocoeval.COCOeval(*tables, kind)
        found.evaluate()
    return found


def _outline(outline: Any, width: int, height: int) -> dict[str, Any]:
    if not outline:
        raise DataError("expected labels with outlines, got boxes; read them with task='instance'")
    return encode_outline(outline, width, height)


def _result(one: dict[str, Any], number: int, split: Split, kind: str) -> dict[str, Any]:
    image, category = one["image_id"], one["category_id"]
    if not 0 <= image < len(split.images) or not 0 <= category < len(split.classes):
        raise DataError(f"prediction {number}: expected numbers of an image and a class, got {image} and {category}")
    row = {"id": number, "image_id": image, "category_id": category, "score": one["score"], "iscrowd": 0}
    if kind == "bbox":
        return {**row, "bbox": list(one["bbox"]), "area": one["bbox"][2] * one["bbox"][3]}
    coco = optional("pycocotools.mask", "average precision of masks", DataError)
    outline = one["segmentation"]
    size = [split.images[image].height, split.images[image].width]
    if not isinstance(outline, dict) or list(outline.get("size", ())) != size or isinstance(outline["counts"], list):
        outline = encode_outline(outline, size[1], size[0])
    return {**row, "segmentation": outline, "area": float(coco.area(outline))}


def confusion(pred: np.ndarray, target: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the number of pixels by class of ``target`` (rows) and of ``pred`` (columns), int64; 255 is ignored."""
    pred, target = np.asarray(pred), np.asarray(target)
    if pred.shape != target.shape:
        raise ValueError(f"expected masks of the same shape, got {pred.shape} and {target.shape}")
    kept = target != IGNORE
    pairs = target[kept].astype(np.int64) * num_classes + pred[kept].astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(confusion: np.ndarray) -> dict[str, Any]:
    """Return ``miou`` and ``per_class``, the intersection over union of each class of a sum of :func:`confusion`.

    A class that occurs neither in targets nor in predictions has None and is left out of the mean.
    """
    ious = _ious(np.asarray(confusion))
    kept = ious[np.isfinite(ious)]
    per_class = [float(iou) if np.isfinite(iou) else None for iou in ious]
    return {"miou": float(kept.mean()) if kept.size else None, "per_class": per_class}


def _ious(confusion: np.ndarray) -> np.ndarray:
    """Return the intersection over union, float (..., classes) of (..., classes, classes); NaN without pixels."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(-1) + confusion.sum(-2) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


def paired_interval(
    split: Split, predictions_a: Sequence[Any], predictions_b: Sequence[Any], kind: str, seed: int
) -> tuple[float, float, float]:
    """Return (difference a - b, low, high) of AP50, or of mIoU, with the 95 % bootstrap interval over images.

    Both are scored on the same resampled images. With ``kind`` "semantic", the predictions are the :func:`confusion` of
    each image; otherwise COCO results.
    """
    number = len(split.images)
    generator = np.random.default_rng(seed_for(seed, "paired interval"))
    weights = generator.multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, number), np.int64), weights])  # the first are the images themselves
    score = _weighted_miou if kind == "semantic" else _weighted_ap50
    first, second = (score(split, one, kind, weights) for one in (predictions_a, predictions_b))
    differences = first - second
    low, high = np.nanpercentile(differences[1:], [2.5, 97.5])
    return float(differences[0]), float(low), float(high)


def _weighted_miou(split: Split, confusions: Sequence[np.ndarray], kind: str, weights: np.ndarray) -> np.ndarray:
    classes = len(split.classes)
    rows = np.stack([np.asarray(one, np.int64) for one in confusions]).reshape(len(split.images), -1)
    return _mean_without_nan(_ious((weights @ rows).reshape(-1, classes, classes)))


def _weighted_ap50(
    split: Split, predictions: Sequence[dict[str, Any]], kind: str, weights: np.ndarray
) -> np.ndarray:
    """Return AP50 for each row of image weights (resamples, images), as pycocotools computes it for weights of 1."""
    found = _evaluate(split, predictions, kind)
    areas, images = len(found.params.areaRng), len(split.images)
    scores = np.full((len(split.classes), len(weights)), np.nan)
    for category in range(len(split.classes)):
        start = (category * areas + AREA_ALL) * images
        matches = [(at, one) for at, one in enumerate(found.evalImgs[start : start + images]) if one is not None]
        if not matches:
            continue
        truths = np.zeros(images, np.int64)
        for at, one in matches:
            truths[at] = int((np.asarray(one["gtIgnore"]) == 0).sum())
        score = np.concatenate([one["dtScores"] for _, one in matches])
        hit = np.concatenate([one["dtMatches"][AT_50] != 0 for _, one in matches])
        kept = np.concatenate([~one["dtIgnore"][AT_50].astype(bool) for _, one in matches])
        image = np.concatenate([np.full(len(one["dtScores"]), at) for at, one in matches])
        order = np.argsort(-score, kind="mergesort")  # stable, as pycocotools' order
        order = order[kept[order]]
        step = max(1, LARGEST // max(len(order), 1))
        for at in range(0, len(weights), step):
            some = weights[at : at + step]
            scores[category, at : at + step] = _average_precision(some[:, image[order]], hit[order], some @ truths)
    return _mean_without_nan(scores.T)


def _average_precision(weights: np.ndarray, hit: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Return the 101-point average precision for each row of ``weights`` (rows, detections); NaN without truths."""
    hits = np.cumsum(weights * hit, axis=1)
    both = np.cumsum(weights, axis=1)
    recall = hits / np.maximum(truths, 1)[:, None]
    precision = hits / np.maximum(both, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    found = np.zeros(len(weights))
    for row in range(len(weights)):
        at = np.searchsorted(recall[row], RECALLS, side="left")
        found[row] = envelope[row][at[at < len(hit)]].sum() / len(RECALLS)
    return np.where(truths > 0, found, np.nan)


def _mean_without_nan(values: np.ndarray) -> np.ndarray:
    """Return the mean of each row over its finite values; NaN where there is none."""
    finite = np.isfinite(values)
    return np.where(finite.any(1), np.where(finite, values, 0).sum(1) / np.maximum(finite.sum(1), 1), np.nan)
