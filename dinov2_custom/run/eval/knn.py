"""Launch a kNN evaluation, under upstream's names. Not the evaluation (``dinov2_custom/eval/knn.py``). Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dinov2_custom import entry
from dinov2_custom.errors import ConfigError
from dinov2_custom.eval.args import get_knn_args_parser
from dinov2_custom.run.submit import Task, get_args_parser, submit_jobs

__all__ = ["Evaluator", "main"]


class Evaluator(Task):
    """A kNN evaluation in every process."""

    module = "dinov2_custom.eval.knn"

    def prepare(self, warn: Callable[[str], None]) -> None:
        """Look for the weights."""
        weights = self.args.pretrained_weights
        if not weights or ("://" not in weights and not Path(weights).expanduser().is_file()):
            raise ConfigError(
                f"--pretrained-weights: expected a weight file, got {weights or 'nothing'}; check the path"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, launch, and return the exit code."""
    knn_parser = get_knn_args_parser(add_help=False)
    parser = get_args_parser(knn_parser.description, parents=[knn_parser])
    return submit_jobs(Evaluator, parser.parse_args(arguments), name="dinov2:knn")


if __name__ == "__main__":
    sys.exit(entry.reported(main))
