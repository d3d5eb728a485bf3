"""Command lines of the evaluations, without torch, so that --help is instant.

Not the evaluations (``knn.py``). Read :func:`get_knn_args_parser` first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def get_args_parser(
    description: str | None = None, parents: Sequence[argparse.ArgumentParser] = (), add_help: bool = True
) -> argparse.ArgumentParser:
    """Return the flags that every evaluation has; with ``add_help=False`` it serves as a parent of other parsers."""
    parser = argparse.ArgumentParser(
        description=description,
        parents=list(parents),
        add_help=add_help,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="YAML file of the model; without it the config.yaml of the run that holds the weights is taken",
    )
    parser.add_argument(
        "--pretrained-weights",
        default="",
        metavar="FILE",
        help="teacher_checkpoint.pth of a run, or released weights",
    )
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        default="",
        metavar="DIR",
        help="where the results go, never a training run's own directory; empty: ./outputs/<date>_<time>",
    )
    parser.add_argument("--opts", nargs="+", default=[], metavar="key=value", help="overrides of the configuration")
    parser.add_argument(
        "--allow-unknown-keys", action="store_true", help="warn about unknown configuration keys instead of refusing"
    )
    return parser


def get_knn_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the parser of the kNN evaluation."""
    parser = get_args_parser(description or "Classify by the nearest neighbours of frozen features.", parents, add_help)
    parser.add_argument(
        "--train-dataset",
        dest="train_dataset_str",
        default="ImageNet:split=TRAIN",
        metavar="DATASET",
        help="labelled neighbours: LabelledFolder:root=<one folder a class>, or ImageNet:split=TRAIN:root=..:extra=..",
    )
    parser.add_argument(
        "--val-dataset",
        dest="val_dataset_str",
        default="ImageNet:split=VAL",
        metavar="DATASET",
        help="what is classified, the same classes",
    )
    parser.add_argument("--nb_knn", nargs="+", type=int, default=[10, 20, 100, 200], help="numbers of neighbours")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the softmax that weighs the votes")
    parser.add_argument("--gather-on-cpu", action="store_true", help="keep the features in CPU memory")
    parser.add_argument("--batch-size", type=int, default=256, help="images a step")
    parser.add_argument("--num-workers", type=int, default=5, help="data-loading processes; 0: in the main process")
    parser.add_argument(
        "--n-per-class-list", nargs="+", type=int, default=[-1], help="neighbours kept a class; -1: all of them"
    )
    parser.add_argument("--n-tries", type=int, default=1, help="random subsets for each of --n-per-class-list")
    parser.add_argument("--resize-size", type=int, default=256, help="pixels of the shorter side before the crop")
    parser.add_argument("--crop-size", type=int, default=224, help="pixels of the central square that is evaluated")
    return parser
