"""Draw the metrics of runs: python run/plots/history.py out [another/run ...] [--output-dir DIR]"""

import sys

from dinov2_custom import entry
from dinov2_custom.plots.args import get_history_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.plots.history", get_history_args_parser().parse_args()))
