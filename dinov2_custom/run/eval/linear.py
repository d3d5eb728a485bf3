"""Launch a linear evaluation, under upstream's names. Does not import torch."""

from dinov2_custom import cli
from dinov2_custom.eval.args import get_linear_args_parser
from dinov2_custom.run.eval.evaluation import Evaluation


class Evaluator(Evaluation):
    """Run a linear evaluation in every process."""

    module, name, script = "dinov2_custom.eval.linear", "dinov2:linear", "run/eval/linear.py"
    get_parser = staticmethod(get_linear_args_parser)


main = Evaluator.launch

if __name__ == "__main__":
    cli.main("linear")
