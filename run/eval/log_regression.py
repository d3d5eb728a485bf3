"""Evaluate by logistic regression: python run/eval/log_regression.py --pretrained-weights
out/eval/training_999/teacher_checkpoint.pth --train-dataset LabelledFolder:root=/my/train
--val-dataset LabelledFolder:root=/my/val"""

import sys

from dinov2_custom import entry
from dinov2_custom.eval.args import get_log_regression_args_parser as get_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.eval.log_regression", get_args_parser().parse_args(), quiet_threads=True))
