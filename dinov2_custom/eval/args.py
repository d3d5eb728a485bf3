"""Command lines of the evaluations, without torch, so that --help is instant.

The evaluations are in ``knn.py``, ``linear.py`` and ``log_regression.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from enum import Enum

from dinov2_custom.cli import AUTO, Parser, add_configuration, add_output_dir, add_workers, number_or_auto


class MetricType(Enum):
    """Averages of the accuracy that an evaluation can report."""

    MEAN_ACCURACY = "mean_accuracy"
    MEAN_PER_CLASS_ACCURACY = "mean_per_class_accuracy"
    PER_CLASS_ACCURACY = "per_class_accuracy"
    IMAGENET_REAL_ACCURACY = "imagenet_real_accuracy"

    @property
    def accuracy_averaging(self) -> AccuracyAveraging | None:
        return getattr(AccuracyAveraging, self.name, None)

    def __str__(self) -> str:
        return self.value


class AccuracyAveraging(Enum):
    """Averaging over samples, over classes, or none; the values are torchmetrics' names."""

    MEAN_ACCURACY = "micro"
    MEAN_PER_CLASS_ACCURACY = "macro"
    PER_CLASS_ACCURACY = "none"

    def __str__(self) -> str:
        return self.value


def get_args_parser(
    description: str | None = None, parents: Sequence[argparse.ArgumentParser] = (), add_help: bool = True
) -> argparse.ArgumentParser:
    """Return a parser of the flags common to all evaluations; with ``add_help=False`` for use as a parent parser."""
    parser = Parser(
        description=description,
        parents=list(parents),
        add_help=add_help,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--pretrained-weights",
        default="",
        metavar="RUN|FILE",
        help="run directory (its newest teacher), teacher_checkpoint.pth of a run, or released weights",
    )
    add_output_dir(
        parser, "folder for the results, not the directory of a training run; empty: ./outputs/<date>_<time>"
    )
    add_configuration(parser, "YAML file of the model; empty: the config.yaml of the run that contains the weights")
    return parser


def get_knn_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the parser of the kNN evaluation."""
    parser = get_args_parser(description or "Classify by the nearest neighbours of frozen features.", parents, add_help)
    _add_datasets(parser)
    parser.add_argument(
        "--nb_knn",
        nargs="+",
        type=int,
        default=[10, 20, 100, 200],
        help="numbers of neighbours k, at most the number of training images",
    )
    parser.add_argument("--temperature", type=float, default=0.07, help="of the softmax that weights the votes")
    parser.add_argument("--gather-on-cpu", action="store_true", help="keep the features in CPU memory")
    parser.add_argument("--batch-size", type=int, default=256, help="images per step")
    add_workers(parser)
    parser.add_argument(
        "--n-per-class-list", nargs="+", type=int, default=[-1], help="training images per class; -1: all of them"
    )
    parser.add_argument("--n-tries", type=int, default=1, help="random subsets for each of --n-per-class-list")
    _add_sizes(parser, "256/224 of --crop-size")
    return parser


def get_linear_args_parser(
    description: str | None = None, parents: Sequence[argparse.ArgumentParser] = (), add_help: bool = True
) -> argparse.ArgumentParser:
    """Return the parser of the linear evaluation."""
    parser = get_args_parser(description or "Train linear classifiers on frozen features.", parents, add_help)
    _add_datasets(parser)
    metrics = [metric.value for metric in MetricType]
    add = parser.add_argument
    add(
        "--test-datasets",
        dest="test_dataset_strs",
        nargs="+",
        metavar="DATASET",
        help="datasets on which the classifier that is best on --val-dataset is also evaluated",
    )
    add("--epochs", type=int, default=10, help="number of epochs of --epoch-length iterations")
    add("--batch-size", type=int, default=128, help="images per step on each GPU")
    add_workers(parser)
    add("--epoch-length", type=int, default=1250, help="iterations per epoch")
    add("--save-checkpoint-frequency", type=int, default=20, help="epochs between checkpoints that are kept")
    add("--eval-period-iterations", type=int, default=1250, help="iterations between evaluations; 0: only at the end")
    add(
        "--learning-rates",
        nargs="+",
        type=float,
        default=[1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1],
        help="learning rates for 256 images per step; scaled to the actual number",
    )
    add("--no-resume", action="store_true", help="do not resume from a checkpoint in the output directory")
    add("--val-metric-type", choices=metrics, default="mean_accuracy", help="metric for --val-dataset")
    add("--test-metric-types", nargs="+", choices=metrics, help="one for each of --test-datasets; default: as val")
    add("--classifier-fpath", metavar="FILE", help="initial classifiers, such as a model_final.pth")
    add("--val-class-mapping-fpath", metavar="FILE", help=".npy with the training class of each class of --val-dataset")
    add(
        "--test-class-mapping-fpaths",
        nargs="+",
        default=[None],
        metavar="FILE",
        help="the same for each of --test-datasets; None for one without",
    )
    _add_sizes(parser, "256/224 of --crop-size")
    return parser


def get_log_regression_args_parser(
    description: str | None = None, parents: Sequence[argparse.ArgumentParser] = (), add_help: bool = True
) -> argparse.ArgumentParser:
    """Return the parser of the logistic regression."""
    parser = get_args_parser(description or "Fit logistic regressions to frozen features.", parents, add_help)
    _add_datasets(parser)
    add = parser.add_argument
    add(
        "--finetune-dataset-str",
        metavar="DATASET",
        help="dataset on which C is selected; default: a tenth of --train-dataset, held out",
    )
    add("--finetune-on-val", action="store_true", help="select C on --val-dataset")
    add(
        "--metric-type",
        choices=[metric.value for metric in MetricType if metric is not MetricType.IMAGENET_REAL_ACCURACY],
        default="mean_accuracy",
        help="metric for --val-dataset",
    )
    add("--train-features-device", default="cpu", help="device of the features and the fit: cpu or cuda")
    add(
        "--train-dtype",
        default="auto",
        help="number type of the fit: float64, or float32 with a check in float64; auto: float32 on a GPU that is slow "
        "in float64",
    )
    add("--max-train-iters", type=int, default=1000, help="L-BFGS iterations for each C")
    add("--solver", choices=("torch", "sklearn"), default="torch", help="sklearn needs the extra [eval], on a CPU")
    add("--batch-size", type=int, default=256, help="images per step on each GPU")
    add_workers(parser)
    _add_sizes(parser, "--crop-size")
    return parser


def _add_datasets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--train-dataset",
        dest="train_dataset_str",
        default="ImageNet:split=TRAIN",
        metavar="DATASET",
        help="labelled images: LabelledFolder:root=<one folder per class>, or ImageNet:split=TRAIN:root=..:extra=..",
    )
    parser.add_argument(
        "--val-dataset",
        dest="val_dataset_str",
        default="ImageNet:split=VAL",
        metavar="DATASET",
        help="labelled images to classify, with the same classes",
    )


def _add_sizes(parser: argparse.ArgumentParser, resize_size: str) -> None:
    parser.add_argument(
        "--resize-size",
        type=number_or_auto,
        default=AUTO,
        help=f"pixels of the shorter side before the crop; auto: {resize_size}",
    )
    parser.add_argument(
        "--crop-size",
        type=number_or_auto,
        default=AUTO,
        help="pixels of the square that the model sees; auto: crops.global_crops_size of the training, 224 for "
        "released weights",
    )
