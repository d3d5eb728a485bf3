"""Command line of the history plot, without torch or matplotlib, so that --help is instant."""

from __future__ import annotations

import argparse


def get_history_args_parser() -> argparse.ArgumentParser:
    """Return the parser of ``run/plots/history.py``."""
    parser = argparse.ArgumentParser(
        description="Draw losses, schedules, entropies, gradient norms and throughput of a run, or of several to "
        "compare them, into history.png and history.html. Works at any time during training."
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
