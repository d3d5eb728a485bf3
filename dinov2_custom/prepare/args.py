"""Command line of the preparation, without torch, so that --help is instant. Read :func:`get_args_parser` first."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from dinov2_custom.commands import Parser, command

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
EPILOG = "exit code: 0 done (bad images are left out and listed), 2 it could not be run"


def get_args_parser(parents: Sequence[argparse.ArgumentParser] = (), add_help: bool = True) -> argparse.ArgumentParser:
    """Return the parser of ``run/data/prepare.py``."""
    parser = Parser(
        prog=command("run/data/prepare.py"),
        description="Check a dataset, shrink, convert or tile its images where asked; write tar shards or a folder.",
        epilog=EPILOG,
        parents=list(parents),
        add_help=add_help,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("dataset", nargs="+", help="as train.dataset_path takes it: a folder, several folders, a dataset string")
    add(
        "--output-dir",
        "--output_dir",
        required=True,
        metavar="DIR",
        help="where the shards go: an empty folder, or that of an interrupted run of the same command to go on",
    )
    add(
        "--short-side",
        type=whole,
        default=0,
        metavar="PIXELS",
        help="shrink images whose shorter side is longer; 512 is a good value for photos (default: keep sizes)",
    )
    add(
        "--format",
        choices=("keep", "jpeg", "png"),
        default="keep",
        help="convert to this format; keep: as they are (default)",
    )
    add("--quality", type=quality, default=90, metavar="1-100", help="of JPEG and WebP files that are written (90)")
    add(
        "--tile",
        type=whole,
        default=0,
        metavar="PIXELS",
        help="cut images above --tile-above into squares of this size; they are not shrunk (default: no tiles)",
    )
    add("--tile-above", type=float, default=50.0, metavar="MEGAPIXELS", help="what --tile counts as huge (50)")
    add(
        "--shard-size",
        type=size,
        default=10**9,
        metavar="SIZE",
        help="bytes of a tar file, such as 500MB; 0: a plain folder of files (1GB)",
    )
    add(
        "--intensity",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become 0 and 255 where images of more than 8 bits are changed, as data.intensity of training "
        "(default: measured on a sample of the dataset, and kept for the rest of the run)",
    )
    add("--page", type=page, default=0, metavar="N", help="page that is read of images with several, from 0 (0)")
    add("--workers", type=whole, default=0, metavar="N", help="processes (default: one for each core)")
    return parser


def whole(text: str) -> int:
    """Parse a whole number above 0."""
    return _number(text, 1, 1 << 30)


def page(text: str) -> int:
    """Parse the number of a page."""
    return _number(text, 0, 1 << 30)


def quality(text: str) -> int:
    """Parse a JPEG quality."""
    return _number(text, 1, 100)


def _number(text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
    return int(text)


def size(text: str) -> int:
    """Parse a number of bytes: 500MB, 1GB, 1.5GB, 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 1GB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2] or ""])
