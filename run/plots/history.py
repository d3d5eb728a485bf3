"""Draw the metrics of runs: python run/plots/history.py out [another/run ...] [--output-dir DIR]"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(
        f"error: expected dinov2_custom in the environment of {sys.executable}, found none; activate the environment "
        "that has it, or `pip install -c constraints.txt -e .` in the root of the repository"
    )
from dinov2_custom.plots.args import get_history_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.plots.history", get_history_args_parser().parse_args()))
