"""Train linear classifiers on frozen features, as upstream's ``eval/linear.py``: 52 at once, the best is reported.

One for every combination of 13 learning rates, the last or the last four blocks, with or without the mean patch.
``linear_classifiers.py`` has the classifiers, ``linear_evaluate.py`` their scoring.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2_custom import entry
from dinov2_custom.data.depth import Reading
from dinov2_custom.data.transforms import make_classification_eval_transform, make_classification_train_transform
from dinov2_custom.eval.args import get_linear_args_parser as get_args_parser
from dinov2_custom.eval.datasets import draws_for_training, num_classes_of, open_labelled
from dinov2_custom.eval.linear_checkpoint import LinearCheckpointer
from dinov2_custom.eval.linear_classifiers import (
    AllClassifiers,
    LinearClassifier,
    LinearPostprocessor,
    create_linear_input,
    has_ddp_wrapper,
    remove_ddp_wrapper,
    scale_lr,
    setup_linear_classifiers,
    sum_of_losses,
)
from dinov2_custom.eval.linear_evaluate import (
    evaluate_linear_classifiers,
    make_eval_data_loader,
    plan_tests,
    read_class_mapping,
    test_on_datasets,
)
from dinov2_custom.eval.metrics import MetricType
from dinov2_custom.eval.setup import check_positive, choose_sizes, evaluation, setup_and_build_model
from dinov2_custom.eval.utils import ModelWithIntermediateLayers, autocast
from dinov2_custom.logging import MetricLogger, open_log
from dinov2_custom.parallel import GradientReducer
from dinov2_custom.utils.transfer import to_device

__all__ = [
    "AllClassifiers",
    "LinearClassifier",
    "LinearPostprocessor",
    "create_linear_input",
    "eval_linear",
    "evaluate_linear_classifiers",
    "get_args_parser",
    "has_ddp_wrapper",
    "main",
    "make_eval_data_loader",
    "remove_ddp_wrapper",
    "run_eval_linear",
    "scale_lr",
    "setup_linear_classifiers",
    "test_on_datasets",
]

logger = logging.getLogger("dinov2")
N_LAST_BLOCKS = (1, 4)
RUNNING_CHECKPOINT = "running_checkpoint_linear_eval"
METRICS_FILE = "results_eval_linear.json"
_SEED = 0


def eval_linear(
    *,
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    train_data_loader: Iterable,
    val_data_loader: Iterable,
    metrics_file_path: str | Path,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    output_dir: str | Path,
    max_iter: int,
    checkpoint_period: int,
    running_checkpoint_period: int,
    eval_period: int,
    metric_type: MetricType,
    training_num_classes: int,
    resume: bool = True,
    classifier_fpath: str | None = None,
    val_class_mapping: Sequence[int] | None = None,
) -> tuple[dict[str, dict[str, Any]], nn.Module, nn.Module, int]:
    """Train until ``max_iter`` and evaluate; return (scores, feature model, classifiers, last iteration).

    ``train_data_loader`` must start where the checkpoint in ``output_dir`` ended. Periods are in iterations.
    """
    checkpointer = LinearCheckpointer(linear_classifiers, output_dir, optimizer, scheduler)
    iteration = start = checkpointer.resume_or_load(classifier_fpath, resume=resume) + 1
    device = next(linear_classifiers.parameters()).device
    reducer = GradientReducer(linear_classifiers.named_parameters())
    score = partial(
        evaluate_linear_classifiers,
        feature_model,
        linear_classifiers,
        val_data_loader,
        metric_type,
        metrics_file_path,
        training_num_classes,
        class_mapping=val_class_mapping,
    )
    metrics = MetricLogger(delimiter="  ")
    for images, labels in metrics.log_every(train_data_loader, 10, "Training", max_iter, start):
        images, labels = to_device(images, device), to_device(labels, device)
        loss = sum_of_losses(linear_classifiers(feature_model(images)), labels)
        optimizer.zero_grad(set_to_none=True)
        reducer.arm()
        loss.backward()
        reducer.finish()
        optimizer.step()
        scheduler.step()
        metrics.update(loss=loss, lr=optimizer.param_groups[0]["lr"])

        done = iteration + 1
        if done % running_checkpoint_period == 0:
            checkpointer.save(RUNNING_CHECKPOINT, iteration)
        if done % checkpoint_period == 0:
            checkpointer.save(f"model_{iteration:07d}", iteration)
        if done == max_iter:
            checkpointer.save("model_final", iteration)
        elif eval_period > 0 and done % eval_period == 0:
            score(iteration, f"iteration {iteration}:")
        iteration = done
    return score(iteration, "at the end:"), feature_model, linear_classifiers, iteration


def run_eval_linear(
    model: nn.Module,
    output_dir: str | Path,
    train_dataset_str: str,
    val_dataset_str: str,
    batch_size: int,
    epochs: int,
    epoch_length: int,
    num_workers: int,
    save_checkpoint_frequency: int,
    eval_period_iterations: int,
    learning_rates: Sequence[float],
    autocast_dtype: torch.dtype,
    test_dataset_strs: Sequence[str] | None = None,
    resume: bool = True,
    classifier_fpath: str | None = None,
    val_class_mapping_fpath: str | None = None,
    test_class_mapping_fpaths: Sequence[str | None] = (None,),
    val_metric_type: MetricType = MetricType.MEAN_ACCURACY,
    test_metric_types: Sequence[MetricType] | None = None,
    *,
    train_transform: Callable | None = None,
    eval_transform: Callable | None = None,
    reading: Reading | None = None,
) -> dict[str, Any]:
    """Train and score linear classifiers on ``model``; all output goes to ``output_dir``.

    Args:
        batch_size: images per step on each rank. epoch_length: iterations. save_checkpoint_frequency: epochs.
        learning_rates: for 256 images per step.
        test_dataset_strs: datasets on which the best classifier on ``val_dataset_str`` is also scored, each with its
            entry of ``test_metric_types`` and ``test_class_mapping_fpaths``.
        train_transform, eval_transform: None for upstream's, 224 pixels with ImageNet's normalisation.
        reading: of images of more than 8 bits, as in the model's training; None to measure it.

    Returns:
        ``{"best_classifier": name, "<dataset string>_accuracy": percent, ...}``.
    """
    tests, types, mappings = plan_tests(
        val_dataset_str, test_dataset_strs, val_metric_type, test_metric_types, test_class_mapping_fpaths
    )
    val_mapping = read_class_mapping("--val-class-mapping-fpath", val_class_mapping_fpath)
    train_dataset = open_labelled("--train-dataset", train_dataset_str, reading=reading)
    num_classes = num_classes_of(train_dataset)
    logger.info(f"dataset: {train_dataset_str} images={len(train_dataset)} classes={num_classes}")
    shared = {"transform": eval_transform, "train_dataset": train_dataset, "has_mapping": val_mapping is not None}
    shared["reading"] = train_dataset.reading
    val_loader = make_eval_data_loader(val_dataset_str, batch_size, num_workers, val_metric_type, **shared)
    open_log("dinov2")

    device = next(model.parameters()).device
    feature_model = ModelWithIntermediateLayers(model, max(N_LAST_BLOCKS), partial(autocast, device, autocast_dtype))
    draws = partial(draws_for_training, train_dataset, train_transform or make_classification_train_transform(), _SEED)
    sample = next(iter(draws(1, num_workers=0)))[0]
    classifiers, groups = setup_linear_classifiers(
        feature_model(sample.to(device)), N_LAST_BLOCKS, learning_rates, batch_size, num_classes
    )
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    max_iter = epochs * epoch_length
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_iter, eta_min=0)
    checkpointer = LinearCheckpointer(classifiers, output_dir, optimizer, scheduler)
    start = checkpointer.resume_or_load(classifier_fpath, resume=resume) + 1
    val_results, *_, iteration = eval_linear(
        feature_model=feature_model,
        linear_classifiers=classifiers,
        train_data_loader=draws(batch_size, num_workers=num_workers, start_iteration=start),
        val_data_loader=val_loader,
        metrics_file_path=Path(output_dir) / METRICS_FILE,
        optimizer=optimizer,
        scheduler=scheduler,
        output_dir=output_dir,
        max_iter=max_iter,
        checkpoint_period=save_checkpoint_frequency * epoch_length,
        running_checkpoint_period=epoch_length,
        eval_period=eval_period_iterations,
        metric_type=val_metric_type,
        training_num_classes=num_classes,
        resume=resume,
        classifier_fpath=classifier_fpath,
        val_class_mapping=val_mapping,
    )
    best = val_results["best_classifier"]
    results: dict[str, Any] = {}
    if tests != [val_dataset_str]:
        results = test_on_datasets(
            feature_model,
            classifiers,
            tests,
            batch_size,
            num_workers,
            types,
            Path(output_dir) / METRICS_FILE,
            num_classes,
            iteration,
            best["name"],
            "test:",
            mappings,
            transform=eval_transform,
            train_dataset=train_dataset,
            reading=train_dataset.reading,
        )
    results |= {"best_classifier": best["name"], f"{val_dataset_str}_accuracy": 100.0 * best["accuracy"]}
    logger.info("linear evaluation: " + " ".join(f"{key}={value}" for key, value in results.items()))
    return results


@evaluation
def main(args: argparse.Namespace) -> int:
    """Run the evaluation that ``args`` (:func:`get_args_parser`) describe; return the exit code."""
    names = ("epochs", "epoch_length", "batch_size", "save_checkpoint_frequency", "crop_size", "resize_size")
    check_positive(args, *names, "learning_rates")
    model, autocast_dtype = setup_and_build_model(args, hold_log=True)
    choose_sizes(args, model)
    run_eval_linear(
        model=model,
        output_dir=args.output_dir,
        train_dataset_str=args.train_dataset_str,
        val_dataset_str=args.val_dataset_str,
        test_dataset_strs=args.test_dataset_strs,
        batch_size=args.batch_size,
        epochs=args.epochs,
        epoch_length=args.epoch_length,
        num_workers=args.num_workers,
        save_checkpoint_frequency=args.save_checkpoint_frequency,
        eval_period_iterations=args.eval_period_iterations,
        learning_rates=args.learning_rates,
        autocast_dtype=autocast_dtype,
        resume=not args.no_resume,
        classifier_fpath=args.classifier_fpath,
        val_metric_type=MetricType(args.val_metric_type),
        test_metric_types=[MetricType(name) for name in args.test_metric_types or ()] or None,
        val_class_mapping_fpath=args.val_class_mapping_fpath,
        test_class_mapping_fpaths=args.test_class_mapping_fpaths,
        train_transform=make_classification_train_transform(crop_size=args.crop_size, **args.normalize),
        eval_transform=make_classification_eval_transform(
            resize_size=args.resize_size, crop_size=args.crop_size, **args.normalize
        ),
        reading=args.reading,
    )
    return 0


if __name__ == "__main__":
    entry.leave(entry.run("dinov2_custom.eval.linear", get_args_parser().parse_args(), quiet_threads=True))
