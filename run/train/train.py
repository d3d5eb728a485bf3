"""Train: python run/train/train.py --config-file configs/vits.yaml --output-dir out train.dataset_path=/my/images"""

import os
import sys

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.train.args import get_args_parser


def main() -> int:
    args = get_args_parser().parse_args()
    # Compute threads that spin while they wait slow a CPU run tenfold when data loading shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dinov2_custom.train.train import main as train

    try:
        return train(args)
    except DINOv2Error as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
