"""Draw what a backbone sees: python run/plots/features.py <run or checkpoint> <folder or dataset string>"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(
        f"error: expected dinov2_custom in the environment of {sys.executable}, found none; activate the environment "
        "that has it, or `pip install -c constraints.txt -e .` in the root of the repository"
    )
from dinov2_custom.plots.args import get_features_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.plots.look", get_features_args_parser().parse_args(), quiet_threads=True))
