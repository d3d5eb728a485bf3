"""Logistic regression on frozen features for 45 regularization strengths, as in upstream but without cuML.

Features are extracted once; the strength is chosen on held-out images, and the final fit uses them too.
``log_regression_solvers.py`` has the solvers.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_custom import distributed, entry
from dinov2_custom.data.depth import Reading
from dinov2_custom.data.transforms import make_classification_eval_transform
from dinov2_custom.errors import ConfigError
from dinov2_custom.eval.args import get_log_regression_args_parser as get_args_parser
from dinov2_custom.eval.datasets import match_classes, open_labelled, open_pair, warn_of_same_files
from dinov2_custom.eval.log_regression_solvers import check_solver, fit
from dinov2_custom.eval.metrics import MetricCollection, MetricType, build_metric
from dinov2_custom.eval.setup import check_positive, choose_sizes, evaluation, setup_and_build_model
from dinov2_custom.eval.utils import ModelWithAutocast, append_lines, extract_features
from dinov2_custom.logging import open_log, track
from dinov2_custom.teacher import device_of_choice
from dinov2_custom.utils.dtype import as_torch_dtype, has_fast_float64
from dinov2_custom.utils.transfer import to_device

logger = logging.getLogger("dinov2")
RESULTS_FILE = "results_eval_log_regression.json"
_ROWS = 4096
_CPU = torch.device("cpu")
DEFAULT_MAX_ITER = 1000
C_POWER_RANGE = torch.linspace(-6, 5, 45)
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


def eval_log_regression(
    *,
    model: nn.Module,
    train_dataset: Any,
    val_dataset: Any,
    finetune_dataset: Any,
    metric_type: MetricType,
    batch_size: int,
    num_workers: int,
    finetune_on_val: bool = False,
    train_dtype: torch.dtype = torch.float64,
    train_features_device: torch.device = _CPU,
    max_train_iters: int = DEFAULT_MAX_ITER,
    solver: str = "torch",
) -> dict[str, Any]:
    """Extract features, choose C, refit including the images used to choose C, and score on ``val_dataset``.

    C is chosen on ``finetune_dataset``; without one on ``val_dataset`` (``finetune_on_val``, no second fit), or on the
    first tenth of a fixed shuffle of ``train_dataset``.

    Returns:
        ``{"best_C": C, "top-1": percent, "top-5": percent}``.
    """
    device = torch.device(train_features_device)

    def features_of(dataset: Any) -> tuple[Tensor, Tensor]:
        features, labels = extract_features(model, dataset, batch_size, num_workers, gather_on_cpu=device.type == "cpu")
        return features.to(device, train_dtype), labels.to(device).long()

    train, val = features_of(train_dataset), features_of(val_dataset)
    num_classes = int(max(train[1].max(), val[1].max())) + 1
    if finetune_dataset is not None:
        finetune = features_of(finetune_dataset)
    elif finetune_on_val:
        finetune = val
    else:
        shuffled = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0)).to(device)
        held_out = len(shuffled) // 10
        if not held_out:
            raise ConfigError(
                f"--train-dataset: expected at least 10 images to hold some out, got {len(shuffled)}; use "
                "--finetune-on-val"
            )
        finetune = tuple(part[shuffled[:held_out]] for part in train)
        train = tuple(part[shuffled[held_out:]] for part in train)
    shared = {"train_dtype": train_dtype, "train_features_device": device, "solver": solver}
    scores, best_C = sweep_C_values(
        train_features=train[0],
        train_labels=train[1],
        test_data_loader=_batches(finetune),
        metric_type=metric_type,
        num_classes=num_classes,
        max_train_iters=max_train_iters,
        **shared,
    )
    logger.info(f"best C={best_C:.5g}")
    if finetune is not val:
        scores = train_and_evaluate(
            C=best_C,
            max_iter=max_train_iters,
            train_features=torch.cat([train[0], finetune[0]]),
            train_labels=torch.cat([train[1], finetune[1]]),
            logreg_metric=build_metric(metric_type, num_classes=num_classes, sync_on_compute=False),
            test_data_loader=_batches(val),
            eval_device=device,
            num_classes=num_classes,
            **shared,
        )
    results = {"best_C": best_C, **{name: 100.0 * float(value.mean()) for name, value in scores.items()}}
    logger.info("logistic regression: " + text_of(scores))
    return results


def _batches(features_and_labels: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(_ROWS) for part in features_and_labels), strict=True))


def eval_log_regression_with_model(
    model: nn.Module,
    train_dataset_str: str = "ImageNet:split=TRAIN",
    val_dataset_str: str = "ImageNet:split=VAL",
    finetune_dataset_str: str | None = None,
    autocast_dtype: torch.dtype = torch.float32,
    finetune_on_val: bool = False,
    metric_type: MetricType = MetricType.MEAN_ACCURACY,
    train_dtype: torch.dtype = torch.float64,
    train_features_device: torch.device = _CPU,
    max_train_iters: int = DEFAULT_MAX_ITER,
    *,
    transform: Callable | None = None,
    batch_size: int = 256,
    num_workers: int = 5,
    solver: str = "torch",
    reading: Reading | None = None,
) -> dict[str, Any]:
    """Run :func:`eval_log_regression` on datasets given by their strings.

    Args:
        transform: None for shorter side and centre 224 pixels, ImageNet's normalisation.
        reading: of images of more than 8 bits, as in the model's training; None to measure it.
    """
    transform = transform or make_classification_eval_transform(resize_size=224)
    train_dataset, val_dataset = open_pair(
        ("--train-dataset", train_dataset_str, transform), ("--val-dataset", val_dataset_str, transform), reading
    )
    warn_of_same_files(train_dataset, val_dataset, "--train-dataset", "--val-dataset")
    finetune_dataset = None
    if finetune_dataset_str:
        flag = "--finetune-dataset-str"
        finetune_dataset = open_labelled(flag, finetune_dataset_str, transform, train_dataset.reading)
        finetune_dataset = match_classes(train_dataset, finetune_dataset, "--train-dataset", flag)
    open_log("dinov2")
    return eval_log_regression(
        model=ModelWithAutocast(model, autocast_dtype),
        train_dataset=train_dataset,
        val_dataset=val_dataset,
        finetune_dataset=finetune_dataset,
        metric_type=metric_type,
        batch_size=batch_size,
        num_workers=num_workers,
        finetune_on_val=finetune_on_val,
        train_dtype=train_dtype,
        train_features_device=train_features_device,
        max_train_iters=max_train_iters,
        solver=solver,
    )


def dtype_of_choice(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype ``name`` for fits on ``device``; ``auto`` is float64 unless the device is slow at it.

    Raises:
        ConfigError: an unknown name, or a dtype that the device does not support.
    """
    if name == "auto":
        return torch.float64 if has_fast_float64(device) else torch.float32
    try:
        dtype = as_torch_dtype(name)
        torch.empty(0, dtype=dtype, device=device)
    except (ValueError, TypeError, RuntimeError) as e:
        raise ConfigError(f"--train-dtype: expected float64 or float32 on {device}, got {name}: {e}; use auto") from e
    return dtype


@evaluation
def main(args: argparse.Namespace) -> int:
    """Run the evaluation that ``args`` (:func:`get_args_parser`) describe; return the exit code."""
    check_positive(args, "max_train_iters", "batch_size", "crop_size", "resize_size")
    check_solver(args.solver)
    device = device_of_choice(args.train_features_device, "--train-features-device")
    dtype = dtype_of_choice(args.train_dtype, device)
    model, autocast_dtype = setup_and_build_model(args, hold_log=True)
    choose_sizes(args, model, resize_ratio=1.0)
    results = eval_log_regression_with_model(
        model=model,
        train_dataset_str=args.train_dataset_str,
        val_dataset_str=args.val_dataset_str,
        finetune_dataset_str=args.finetune_dataset_str,
        autocast_dtype=autocast_dtype,
        finetune_on_val=args.finetune_on_val,
        metric_type=MetricType(args.metric_type),
        train_dtype=dtype,
        train_features_device=device,
        max_train_iters=args.max_train_iters,
        transform=make_classification_eval_transform(
            resize_size=args.resize_size, crop_size=args.crop_size, **args.normalize
        ),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        solver=args.solver,
        reading=args.reading,
    )
    lines = (json.dumps({key: value}) for key, value in results.items())
    append_lines(Path(args.output_dir) / RESULTS_FILE, lines)
    return 0


if __name__ == "__main__":
    entry.leave(entry.run("dinov2_custom.eval.log_regression", get_args_parser().parse_args(), quiet_threads=True))
