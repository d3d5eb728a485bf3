"""Train on real photographs for a few minutes: python run/quickstart.py"""

import os
import sys
from pathlib import Path

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.quickstart.args import get_args_parser

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def main() -> int:
    args = get_args_parser(config_file=str(RECIPE)).parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as run/train/train.py
    from dinov2_custom.quickstart.main import main as quickstart

    try:
        return quickstart(args)
    except DINOv2Error as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
