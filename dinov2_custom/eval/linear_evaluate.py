"""Score trained linear classifiers on a dataset, choose the best, write ``results_eval_linear.json``. Upstream's names.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from dinov2_custom.data.depth import Reading
from dinov2_custom.data.image_batches import ImageLoader
from dinov2_custom.data.transforms import make_classification_eval_transform
from dinov2_custom.errors import ConfigError
from dinov2_custom.eval.datasets import every_image_once, match_classes, open_labelled, warn_of_same_files
from dinov2_custom.eval.linear_classifiers import LinearPostprocessor, remove_ddp_wrapper
from dinov2_custom.eval.metrics import MetricType, build_metric
from dinov2_custom.eval.results import append_lines
from dinov2_custom.eval.utils import evaluate

logger = logging.getLogger("dinov2")


def evaluate_linear_classifiers(
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    data_loader: Iterable[tuple[Tensor, Any]],
    metric_type: MetricType,
    metrics_file_path: str | Path,
    training_num_classes: int,
    iteration: int,
    prefixstring: str = "",
    class_mapping: Sequence[int] | None = None,
    best_classifier_on_val: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Score all classifiers; return ``{"best_classifier": {"name": ..., "accuracy": 0..1}}``, also added to the file.

    Args:
        best_classifier_on_val: report this classifier instead of selecting the best.
    """
    num_classes = training_num_classes if class_mapping is None else len(class_mapping)
    classifiers = remove_ddp_wrapper(linear_classifiers).classifiers_dict
    if best_classifier_on_val is not None:
        classifiers = {best_classifier_on_val: classifiers[best_classifier_on_val]}
    _, scores = evaluate(
        feature_model,
        data_loader,
        {name: LinearPostprocessor(classifier, class_mapping) for name, classifier in classifiers.items()},
        {name: build_metric(metric_type, num_classes=num_classes) for name in classifiers},
        next(linear_classifiers.parameters()).device,
    )
    accuracies = {}
    for name, score in scores.items():
        top1, top5 = (float(score[key].mean()) for key in ("top-1", "top-5"))  # average over classes
        accuracies[name] = top1
        logger.info(f"{prefixstring} classifier={name} top1={top1:.2%} top5={top5:.2%}")
    best = max(accuracies, key=accuracies.get)
    results = {"best_classifier": {"name": best, "accuracy": accuracies[best]}}
    logger.info(f"{prefixstring} best classifier={best} top1={accuracies[best]:.2%}")
    if metrics_file_path:
        lines = [f"iter: {iteration}", *(json.dumps({key: value}) for key, value in results.items()), ""]
        append_lines(Path(metrics_file_path), lines)
    return results


def make_eval_data_loader(
    test_dataset_str: str,
    batch_size: int,
    num_workers: int,
    metric_type: MetricType,
    *,
    transform: Callable | None = None,
    train_dataset: Any = None,
    has_mapping: bool = False,
    flag: str = "--val-dataset",
    reading: Reading | None = None,
) -> ImageLoader:
    """Return a loader that yields every image once over all ranks.

    Args:
        transform: None for shorter side 256, central 224 pixels, ImageNet's normalisation.
        train_dataset: its class indices are used if both have a folder for each class, unless ``has_mapping``.
        flag: the flag that gave ``test_dataset_str``, for error messages.
        reading: of images of more than 8 bits; None to measure it.
    """
    dataset = open_labelled(flag, test_dataset_str, transform or make_classification_eval_transform(), reading)
    if train_dataset is not None:
        warn_of_same_files(train_dataset, dataset, "--train-dataset", flag)
    if train_dataset is not None and not has_mapping:
        dataset = match_classes(train_dataset, dataset, "--train-dataset", flag)
    collate = _pad if metric_type is MetricType.IMAGENET_REAL_ACCURACY else default_collate
    return every_image_once(dataset, batch_size, num_workers, collate)


def _pad(targets: Sequence[Any]) -> Tensor:
    """Return the true labels (one or several) of each image as int64 (B, most labels), padded with -1."""
    labels = [np.atleast_1d(np.asarray(target, dtype=np.int64)) for target in targets]
    padded = np.full((len(labels), max(1, *map(len, labels))), -1)
    for row, own in zip(padded, labels, strict=True):
        row[: len(own)] = own
    return torch.from_numpy(padded)


def test_on_datasets(
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    test_dataset_strs: Sequence[str],
    batch_size: int,
    num_workers: int,
    test_metric_types: Sequence[MetricType],
    metrics_file_path: str | Path,
    training_num_classes: int,
    iteration: int,
    best_classifier_on_val: str,
    prefixstring: str = "",
    test_class_mappings: Sequence[Sequence[int] | None] = (None,),
    *,
    transform: Callable | None = None,
    train_dataset: Any = None,
    reading: Reading | None = None,
) -> dict[str, float]:
    """Score one classifier on each dataset; return ``{"<dataset string>_accuracy": percent}``."""
    results = {}
    for text, mapping, metric_type in zip(test_dataset_strs, test_class_mappings, test_metric_types, strict=True):
        logger.info(f"test dataset: {text}")
        shared = {"train_dataset": train_dataset, "has_mapping": mapping is not None, "reading": reading}
        options = {"transform": transform, "flag": "--test-datasets", **shared}
        loader = make_eval_data_loader(text, batch_size, num_workers, metric_type, **options)
        best = evaluate_linear_classifiers(
            feature_model,
            linear_classifiers,
            loader,
            metric_type,
            metrics_file_path,
            training_num_classes,
            iteration,
            prefixstring,
            mapping,
            best_classifier_on_val,
        )
        results[f"{text}_accuracy"] = 100.0 * best["best_classifier"]["accuracy"]
    return results


test_on_datasets.__test__ = False  # upstream's name, not a test


def read_class_mapping(flag: str, path: str | None) -> np.ndarray | None:
    """Return the integers of an ``.npy`` file; None without a path.

    Raises:
        ConfigError: not such a file.
    """
    if not path or path == "None":
        return None
    try:
        mapping = np.load(Path(path).expanduser(), allow_pickle=False)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{flag}: expected an .npy file of class indices, got {e} at {path}") from e
    if mapping.ndim != 1 or mapping.dtype.kind not in "iu":
        raise ConfigError(f"{flag}: expected whole numbers in a row, got {mapping.dtype} {mapping.shape} in {path}")
    return mapping


def plan_tests(
    val_dataset: str,
    datasets: Sequence[str] | None,
    val_type: MetricType,
    types: Sequence[MetricType] | None,
    mapping_files: Sequence[str | None],
) -> tuple[list[str], list[MetricType], list]:
    """Return test datasets, their metrics and class mappings, all of the same length.

    Raises:
        ConfigError: the lists have different lengths, or a class mapping cannot be read.
    """
    tests = list(datasets or [val_dataset])
    types = list(types or [val_type] * len(tests))
    files = list(mapping_files)
    if not any(files):
        files = [None] * len(tests)
    if not len(tests) == len(types) == len(files):
        raise ConfigError(
            f"--test-datasets: expected a metric and a class mapping for each or none at all, got {len(tests)}, "
            f"{len(types)} --test-metric-types, {len(files)} --test-class-mapping-fpaths; None stands for no mapping"
        )
    return tests, types, [read_class_mapping("--test-class-mapping-fpaths", file) for file in files]
