"""Command line of the patches, without torch."""

from __future__ import annotations

import argparse

from dinov2_custom.commands import Parser


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of ``run/patches/apply.py``."""
    parser = Parser(
        prog="python run/patches/apply.py",
        description="Apply this project's fixes to a checkout of dinov2, take them out again, or tell which are "
        "applied. Each appends a marked block to the modules it concerns; no other line is touched.",
        allow_abbrev=False,
    )
    parser.add_argument("checkout", help="folder that holds the package dinov2")
    parser.add_argument("--only", default="", metavar="a,b", help="these patches instead of all of the series")
    parser.add_argument("--revert", action="store_true", help="take the blocks out, to the byte")
    parser.add_argument("--status", action="store_true", help="tell the state of each patch; change nothing")
    parser.add_argument("--diff", action="store_true", help="show what would change; change nothing")
    parser.add_argument(
        "--patches", default="", metavar="DIR", help="folder with the series (default: patches/ of this repository)"
    )
    return parser
