"""Evaluate by linear classifiers: python run/eval/linear.py --pretrained-weights
out/eval/training_999/teacher_checkpoint.pth --train-dataset LabelledFolder:root=/my/train
--val-dataset LabelledFolder:root=/my/val"""

import sys

from dinov2_custom import entry
from dinov2_custom.run.eval.linear import main

if __name__ == "__main__":
    sys.exit(entry.reported(main))
