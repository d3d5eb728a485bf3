"""Draw the metrics of runs: python run/plots/history.py out [another/run ...] [--output-dir DIR]"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
from dinov2_custom.plots.args import get_history_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.plots.history", get_history_args_parser().parse_args()))
