"""What the launched evaluations share. Not the evaluations (``dinov2_custom/eval/``). Torch-free."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from dinov2_custom.commands import command
from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.run.submit import Task, get_args_parser, submit_jobs
from dinov2_custom.utils.run_folder import find_weights


class Evaluation(Task):
    """An evaluation of ``args.pretrained_weights`` in every process."""

    def prepare(self, warn: Callable[[str], None]) -> None:
        """Look for the weights.

        Raises:
            ConfigError: nothing there, or a directory without weights.
        """
        given = self.args.pretrained_weights
        try:
            weights = given and find_weights(given)
        except CheckpointError as e:
            raise ConfigError(f"--pretrained-weights: {e}") from e
        if not weights or ("://" not in weights and not Path(weights).exists()):
            got = given or "nothing"
            raise ConfigError(f"--pretrained-weights: expected a weight file or a run directory, got {got}; check it")


def launch(
    task: type[Task], parser: argparse.ArgumentParser, name: str, script: str, arguments: Sequence[str] | None
) -> int:
    """Parse the command line with the launcher's flags added to ``parser``, launch, and return the exit code."""
    parser = get_args_parser(parser.description, parents=[parser])
    parser.prog = command(script)
    return submit_jobs(task, parser.parse_args(arguments), name)
