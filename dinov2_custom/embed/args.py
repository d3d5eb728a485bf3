"""Command line of the features, without torch, so that --help is instant."""

from __future__ import annotations

import argparse

from dinov2_custom.teacher_args import add_configuration, add_workers, teacher_parser

FEATURES = ("cls", "mean", "cls+mean")


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Return the parser of ``run/embed.py``; with ``add_help=False`` it serves as a parent of other parsers."""
    parser = teacher_parser(
        "Write the features of every image of a dataset. The same command goes on where it was stopped; several "
        "processes share the work.",
        "checkpoint",
        "folder of images, or a dataset string as for training; labels are kept",
        add_help=add_help,
    )
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        default="",
        metavar="DIR",
        help="where the files go (empty: ./outputs/embed/<name of the run>)",
    )
    parser.add_argument(
        "--format", choices=("npy", "parquet"), default="npy", help="features.npy and rows.jsonl, or both in one"
    )
    parser.add_argument(
        "--features",
        choices=FEATURES,
        default="cls",
        help="class token, mean of the patch tokens, or one after the other",
    )
    parser.add_argument("--l2", action="store_true", help="scale each row to length 1")
    parser.add_argument("--save-dtype", choices=("float32", "float16"), default="float32", help="numbers in the file")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=[],
        metavar="PIXELS",
        help="side of the central square that is seen, after the shorter side was resized to 256/224 of it; several "
        "sizes give a folder each (default: that of the training, 224 for released weights)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    add_workers(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: a GPU if there is one")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="number type that the model computes in; auto: bf16 on a GPU that has it, else fp32",
    )
    add_configuration(parser)
    parser.add_argument("--overwrite", action="store_true", help="begin anew where other features lie")
    return parser
