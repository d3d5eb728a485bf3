"""Draw what a backbone sees: python run/plots/features.py <run or checkpoint> <folder or dataset string>"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
from dinov2_custom.plots.args import get_features_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.plots.look", get_features_args_parser().parse_args(), quiet_threads=True))
