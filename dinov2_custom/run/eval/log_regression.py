"""Launch a logistic regression, under upstream's names. Does not import torch."""

from dinov2_custom import cli
from dinov2_custom.eval.args import get_log_regression_args_parser
from dinov2_custom.run.eval.evaluation import Evaluation


class Evaluator(Evaluation):
    """Run a logistic regression in every process."""

    module, name, script = "dinov2_custom.eval.log_regression", "dinov2:logreg", "run/eval/log_regression.py"
    get_parser = staticmethod(get_log_regression_args_parser)


main = Evaluator.launch

if __name__ == "__main__":
    cli.main("log_regression")
