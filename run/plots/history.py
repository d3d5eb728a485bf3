"""Draw the metrics of runs: python run/plots/history.py out [another/run ...] [--output-dir DIR]"""

import sys

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.plots.args import get_history_args_parser


def main() -> int:
    args = get_history_args_parser().parse_args()
    from dinov2_custom.plots.history import main as draw

    try:
        return draw(args)
    except DINOv2Error as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
