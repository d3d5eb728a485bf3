"""Flags of every command that starts from a teacher, without torch. Not what they mean (``teacher.py``)."""

from __future__ import annotations

import argparse

from dinov2_custom.commands import Parser

AUTO = "auto"


def teacher_parser(
    description: str,
    source: str,
    dataset_help: str = "",
    *,
    formatter_class: type[argparse.HelpFormatter] = argparse.ArgumentDefaultsHelpFormatter,
    add_help: bool = True,
    prog: str | None = None,
) -> argparse.ArgumentParser:
    """Return a parser with the positional ``source``, a run directory or weight file.

    Args:
        dataset_help: of a positional ``dataset``; empty: there is none.
    """
    parser = Parser(
        prog=prog, description=description, formatter_class=formatter_class, add_help=add_help, allow_abbrev=False
    )
    parser.add_argument(source, metavar="RUN|CHECKPOINT", help="run directory (its newest teacher) or weight file")
    if dataset_help:
        parser.add_argument("dataset", help=dataset_help)
    return parser


def add_configuration(
    parser: argparse.ArgumentParser, file_help: str = "configuration of the model, instead of the run's config.yaml"
) -> None:
    """Add ``--config-file``, ``--opts`` and ``--allow-unknown-keys``."""
    parser.add_argument("--config-file", default="", metavar="FILE", help=file_help)
    parser.add_argument("--opts", nargs="+", default=[], metavar="key=value", help="overrides of the configuration")
    parser.add_argument(
        "--allow-unknown-keys", action="store_true", help="warn about unknown configuration keys instead of refusing"
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add ``--num-workers``."""
    parser.add_argument(
        "--num-workers",
        type=number_or_auto,
        default=AUTO,
        help="data-loading processes; 0: in the main process; auto: one a core that this process may use, at most 16",
    )


def number_or_auto(text: str) -> int | str:
    """Parse a whole number of at least 0, or ``auto``."""
    if text != AUTO and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number or {AUTO}, got {text!r}")
    return text if text == AUTO else int(text)
