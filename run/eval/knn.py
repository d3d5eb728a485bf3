"""Evaluate by kNN: python run/eval/knn.py --pretrained-weights out/eval/training_999/teacher_checkpoint.pth
--train-dataset LabelledFolder:root=/my/train --val-dataset LabelledFolder:root=/my/val"""

import os
import sys

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.eval.args import get_knn_args_parser


def main() -> int:
    args = get_knn_args_parser().parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as run/train/train.py
    from dinov2_custom.eval.knn import main as evaluate

    try:
        return evaluate(args)
    except DINOv2Error as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
