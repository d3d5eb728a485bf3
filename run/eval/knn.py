"""Evaluate by kNN: python run/eval/knn.py --pretrained-weights out/eval/training_999/teacher_checkpoint.pth
--train-dataset LabelledFolder:root=/my/train --val-dataset LabelledFolder:root=/my/val"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(
        f"error: expected dinov2_custom in the environment of {sys.executable}, found none; activate the environment "
        "that has it, or `pip install -c constraints.txt -e .` in the root of the repository"
    )
from dinov2_custom.run.eval.knn import main

if __name__ == "__main__":
    sys.exit(entry.reported(main))
