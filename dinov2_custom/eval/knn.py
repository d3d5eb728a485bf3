"""Weighted k-nearest-neighbour classification on frozen features, as upstream's ``eval/knn.py``.

Each test image is classified by its nearest training images in cosine similarity, weighted by a softmax over the
similarities.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov2_custom import distributed, entry
from dinov2_custom.data.depth import Reading
from dinov2_custom.data.transforms import make_classification_eval_transform
from dinov2_custom.errors import DataError
from dinov2_custom.eval.args import get_knn_args_parser as get_args_parser
from dinov2_custom.eval.datasets import find_same_files, open_pair
from dinov2_custom.eval.metrics import AccuracyAveraging, MetricCollection, build_topk_accuracy_metric
from dinov2_custom.eval.neighbours import KnnModule
from dinov2_custom.eval.setup import check_positive, choose_sizes, evaluation, setup_and_build_model
from dinov2_custom.eval.utils import ModelWithNormalize, append_lines, extract_features
from dinov2_custom.logging import open_log
from dinov2_custom.utils.transfer import to_device

logger = logging.getLogger("dinov2")
_QUERIES_A_STEP = 256


def eval_knn_features(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    nb_knn: Sequence[int],
    temperature: float = 0.07,
    accuracy_averaging: AccuracyAveraging = AccuracyAveraging.MEAN_ACCURACY,
    n_per_class_list: Sequence[int] = (-1,),
    n_tries: int = 1,
    exclude: Tensor | None = None,
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Classify ``val_features`` (M, D) by ``train_features`` (N, D), both with rows of length 1.

    With several processes, each of which must have all features, each classifies its shard.

    Args:
        n_per_class_list: training images kept per class, -1 for all; only numbers of neighbours up to it are used, and
            it is added to them.
        n_tries: number of random subsets to average over, if the images per class are limited.
        exclude: (M,) index of the training feature that is the same image and is excluded; -1 for none.

    Numbers of neighbours above the number of training features are reduced to it, with a warning.

    Returns:
        ``{("full", k) or ("<n> per class", k): {"top-1": accuracy in 0..1, "top-5": ...}}``.

    Raises:
        DataError: one of the feature sets is empty.
    """
    if not len(train_features) or not len(val_features):
        counts = f"{len(train_features)} for training, {len(val_features)} to classify"
        raise DataError(f"kNN: expected features, got {counts}; check both datasets")
    num_classes = int(max(train_labels.max(), val_labels.max())) + 1
    results: dict[tuple[str, int], dict[str, Tensor]] = {}
    for n_per_class in n_per_class_list:
        ks, tries = sorted(set(nb_knn)), [slice(None)]
        if n_per_class >= 0:
            ks = sorted({k for k in nb_knn if k <= n_per_class} | {n_per_class})
            tries = [_subset(train_labels, n_per_class, seed).to(train_labels.device) for seed in range(n_tries)]
        name = "full" if n_per_class < 0 else f"{n_per_class} per class"
        ks = _at_most(len(train_labels[tries[0]]) - (exclude is not None), ks, name)
        scores: dict[int, list[dict[str, Tensor]]] = {k: [] for k in ks}
        for chosen in tries:
            module = KnnModule(train_features[chosen], train_labels[chosen], ks, temperature, num_classes=num_classes)
            metrics = {k: build_topk_accuracy_metric(accuracy_averaging, num_classes) for k in ks}
            own = None if exclude is None else _among(chosen, exclude, len(train_labels))
            _classify(module, val_features, val_labels, metrics, own)
            for k in ks:
                scores[k].append(metrics[k].compute())
        for k, tried in scores.items():
            results[name, k] = {top: torch.stack([one[top] for one in tried]).mean(dim=0) for top in tried[0]}
    return results


def eval_knn(
    model: nn.Module,
    train_dataset: Dataset,
    val_dataset: Dataset,
    accuracy_averaging: AccuracyAveraging,
    nb_knn: Sequence[int],
    temperature: float,
    batch_size: int,
    num_workers: int,
    gather_on_cpu: bool,
    n_per_class_list: Sequence[int] = (-1,),
    n_tries: int = 1,
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Extract the features of two labelled datasets with ``model``, whose outputs have length 1, and classify them.

    Returns the result of :func:`eval_knn_features`.
    """
    same_files = torch.from_numpy(find_same_files(train_dataset, val_dataset))
    if count := int((same_files >= 0).sum()):
        logger.info(
            f"kNN: {count:,} of the {len(same_files):,} images to classify are training images, too; an image is not "
            "its own neighbour"
        )
    extracted: list[Tensor] = []
    for name, dataset in (("train", train_dataset), ("val", val_dataset)):
        logger.info(f"features: {name} images={len(dataset)}")
        extracted += extract_features(model, dataset, batch_size, num_workers, gather_on_cpu)
    return eval_knn_features(
        *extracted,
        nb_knn=nb_knn,
        temperature=temperature,
        accuracy_averaging=accuracy_averaging,
        n_per_class_list=n_per_class_list,
        n_tries=n_tries,
        exclude=same_files if count else None,
    )


def _classify(
    module: KnnModule,
    features: Tensor,
    labels: Tensor,
    metrics: dict[int, MetricCollection],
    exclude: Tensor | None = None,
) -> None:
    for metric in metrics.values():
        metric.to(module.train_features.device)
    start, step = distributed.get_global_rank(), distributed.get_global_size()
    own = torch.arange(start, len(features), step, device=features.device)
    exclude = None if exclude is None else exclude.to(features.device)
    for rows in own.split(_QUERIES_A_STEP):
        votes = module(features[rows], exclude=None if exclude is None else exclude[rows])
        for k, scores in votes.items():
            metrics[k].update(scores, to_device(labels[rows], scores.device))


def _among(chosen: slice | Tensor, indices: Tensor, count: int) -> Tensor:
    """Return the position of each of ``indices``, in 0..count-1 or -1, in ``chosen``; -1 if absent."""
    if isinstance(chosen, slice):
        return indices
    place = torch.full((count + 1,), -1)  # the last element is for index -1
    place[chosen.cpu()] = torch.arange(len(chosen))
    return place[indices]


def _at_most(available: int, ks: Sequence[int], name: str) -> list[int]:
    """Return ``ks`` without those above the ``available`` training images, which are replaced by that number, once."""
    if too_many := [k for k in ks if k > available]:
        logger.warning(
            f"--nb_knn, {name}: expected at most the {available} training images, got k = "
            f"{', '.join(map(str, too_many))}; evaluated with k = {available} instead"
        )
    return sorted({min(k, available) for k in ks})


def _subset(labels: Tensor, n_per_class: int, seed: int) -> Tensor:
    """Return the indices of ``n_per_class`` random samples per class (all of a smaller class)."""
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    members = [(labels == label).nonzero().flatten() for label in labels.unique()]
    return torch.cat([m[torch.randperm(len(m), generator=generator)[:n_per_class]] for m in members])


def eval_knn_with_model(
    model: nn.Module,
    output_dir: str,
    train_dataset_str: str = "ImageNet:split=TRAIN",
    val_dataset_str: str = "ImageNet:split=VAL",
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    autocast_dtype: torch.dtype = torch.float32,
    accuracy_averaging: AccuracyAveraging = AccuracyAveraging.MEAN_ACCURACY,
    transform=None,
    gather_on_cpu: bool = False,
    batch_size: int = 256,
    num_workers: int = 5,
    n_per_class_list: Sequence[int] = (-1,),
    n_tries: int = 1,
    *,
    reading: Reading | None = None,
) -> dict[str, float]:
    """Evaluate ``model`` and append the accuracies, in percent, to ``results_eval_knn.json`` in ``output_dir``.

    Args:
        transform: maps an RGB image to a tensor; default: shorter side 256, central 224 pixels, ImageNet's
            normalisation.
        reading: of images of more than 8 bits, as in the model's training; None to measure it.

    Returns:
        ``{"('full', 10) Top 1": percent, ...}``, which is also written to the file, one pair per line.
    """
    transform = transform or make_classification_eval_transform()
    train_dataset, val_dataset = open_pair(
        ("--train-dataset", train_dataset_str, transform), ("--val-dataset", val_dataset_str, transform), reading
    )
    open_log("dinov2")
    model = ModelWithNormalize(model, autocast_dtype)
    options = (accuracy_averaging, nb_knn, temperature, batch_size, num_workers, gather_on_cpu)
    accuracies = eval_knn(model, train_dataset, val_dataset, *options, n_per_class_list, n_tries)
    results: dict[str, float] = {}
    for key, values in accuracies.items():
        top1, top5 = (values[name].mean().item() * 100 for name in ("top-1", "top-5"))
        results |= {f"{key} Top 1": top1, f"{key} Top 5": top5}
        logger.info(f"{key} top1={top1:.2f}% top5={top5:.2f}%")
    lines = (json.dumps({key: value}) for key, value in results.items())
    append_lines(Path(output_dir) / "results_eval_knn.json", lines)
    return results


@evaluation
def main(args: argparse.Namespace) -> int:
    """Run the evaluation that ``args`` (:func:`get_args_parser`) describe; return the exit code."""
    check_positive(args, "nb_knn", "batch_size", "crop_size", "resize_size")
    model, autocast_dtype = setup_and_build_model(args, hold_log=True)
    choose_sizes(args, model)
    eval_knn_with_model(
        model=model,
        output_dir=args.output_dir,
        train_dataset_str=args.train_dataset_str,
        val_dataset_str=args.val_dataset_str,
        nb_knn=args.nb_knn,
        temperature=args.temperature,
        autocast_dtype=autocast_dtype,
        transform=make_classification_eval_transform(
            resize_size=args.resize_size, crop_size=args.crop_size, **args.normalize
        ),
        gather_on_cpu=args.gather_on_cpu,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        n_per_class_list=args.n_per_class_list,
        n_tries=args.n_tries,
        reading=args.reading,
    )
    return 0


if __name__ == "__main__":
    entry.leave(entry.run("dinov2_custom.eval.knn", get_args_parser().parse_args(), quiet_threads=True))
