"""Command line of the verification, without torch, so that --help is instant. Read :func:`get_args_parser` first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dinov2_custom.commands import Parser, command

EXIT_CODES = (
    "exit code: 0 all images are sound, 1 there are bad images or parts that cannot be listed (both are listed), 2 it "
    "could not be run"
)


def get_args_parser(parents: Sequence[argparse.ArgumentParser] = (), add_help: bool = True) -> argparse.ArgumentParser:
    """Return the parser of ``run/data/verify.py``."""
    parser = Parser(
        prog=command("run/data/verify.py"),
        description="Decode every image of a dataset strictly; list the bad ones and write a clean list to train on.",
        epilog=EXIT_CODES,
        parents=list(parents),
        add_help=add_help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "dataset", nargs="+", help="as train.dataset_path takes it: a folder, several folders, a dataset string"
    )
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        default="",
        metavar="DIR",
        help="where results go; run again with the same one to go on (default: ./outputs/verify_<dataset>)",
    )
    parser.add_argument(
        "--workers", type=positive, default=0, metavar="N", help="decoder processes (default: one for each core)"
    )
    return parser


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return number
