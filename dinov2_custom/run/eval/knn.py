"""Launch a kNN evaluation, under upstream's names. Does not import torch."""

from dinov2_custom import cli
from dinov2_custom.eval.args import get_knn_args_parser
from dinov2_custom.run.eval.evaluation import Evaluation


class Evaluator(Evaluation):
    """Run a kNN evaluation in every process."""

    module, name, script = "dinov2_custom.eval.knn", "dinov2:knn", "run/eval/knn.py"
    get_parser = staticmethod(get_knn_args_parser)


main = Evaluator.launch

if __name__ == "__main__":
    cli.main("knn")
