"""Evaluate by linear classifiers: python run/eval/linear.py --pretrained-weights
out/eval/training_999/teacher_checkpoint.pth --train-dataset LabelledFolder:root=/my/train
--val-dataset LabelledFolder:root=/my/val"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
from dinov2_custom.run.eval.linear import main

if __name__ == "__main__":
    entry.leave(entry.reported(main))
