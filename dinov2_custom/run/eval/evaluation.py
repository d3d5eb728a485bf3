"""What the launched evaluations share. Not the evaluations (``dinov2_custom/eval/``). Torch-free."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from dinov2_custom.errors import ConfigError
from dinov2_custom.run.submit import Task, get_args_parser, submit_jobs


class Evaluation(Task):
    """An evaluation of ``args.pretrained_weights`` in every process."""

    def prepare(self, warn: Callable[[str], None]) -> None:
        """Look for the weights."""
        weights = self.args.pretrained_weights
        if not weights or ("://" not in weights and not Path(weights).expanduser().is_file()):
            got = weights or "nothing"
            raise ConfigError(f"--pretrained-weights: expected a weight file, got {got}; check the path")


def launch(task: type[Task], parser: argparse.ArgumentParser, name: str, arguments: Sequence[str] | None) -> int:
    """Parse the command line with the launcher's flags added to ``parser``, launch, and return the exit code."""
    return submit_jobs(task, get_args_parser(parser.description, parents=[parser]).parse_args(arguments), name)
