"""Command lines of the plots, without torch or matplotlib, so that --help is instant."""

from __future__ import annotations

import argparse

from dinov2_custom.commands import Parser, command
from dinov2_custom.teacher_args import add_configuration, teacher_parser


def get_history_args_parser() -> argparse.ArgumentParser:
    """Return the parser of ``run/plots/history.py``."""
    parser = Parser(
        prog=command("run/plots/history.py"),
        description="Draw losses, schedules, entropies, gradient norms and throughput of a run, or of several to "
        "compare them, into history.png and history.html. Works at any time during training.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output directory of a training, or a folder of such directories"
    )
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        default=None,
        metavar="DIR",
        help="where the two files go (default: the run's directory; of several runs, the current one)",
    )
    return parser


def get_features_args_parser() -> argparse.ArgumentParser:
    """Return the parser of ``run/plots/features.py``."""
    parser = teacher_parser(
        "Draw what a trained backbone sees in images: pca.png (principal components of patch features), "
        "attention.png (where the class token looks, all heads) and scatter.png (each image a point, coloured by class "
        "where there are classes: LabelledFolder, or a folder a class).",
        "checkpoint",
        "folder of images, or a dataset string",
        prog=command("run/plots/features.py"),
    )
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        default="",
        metavar="DIR",
        help="folder of the pictures (empty: ./outputs/features/<name of the run>)",
    )
    parser.add_argument("--num-images", type=int, default=6, help="images in pca.png and attention.png")
    parser.add_argument("--num-points", type=int, default=1000, help="images in scatter.png; 0: do not draw it")
    parser.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="shorter side in pca.png and attention.png, rounded to whole patches (0: that of the training)",
    )
    parser.add_argument(
        "--heads", type=int, default=6, help="heads shown one by one in attention.png, besides their mean"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: a GPU if there is one")
    add_configuration(parser)
    return parser
