"""Launch a linear evaluation, under upstream's names. Not the evaluation itself. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from dinov2_custom import cli
from dinov2_custom.eval.args import get_linear_args_parser
from dinov2_custom.run.eval.evaluation import Evaluation, launch

__all__ = ["Evaluator", "main"]


class Evaluator(Evaluation):
    """A linear evaluation in every process."""

    module = "dinov2_custom.eval.linear"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, launch, and return the exit code."""
    return launch(Evaluator, get_linear_args_parser(add_help=False), "dinov2:linear", "run/eval/linear.py", arguments)


if __name__ == "__main__":
    cli.main("linear")
