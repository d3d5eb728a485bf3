"""Features of a dataset: python run/embed.py <run or checkpoint> <folder or dataset string> [--output-dir DIR]"""

import sys

from dinov2_custom import entry
from dinov2_custom.embed.args import get_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.embed.main", get_args_parser().parse_args(), quiet_threads=True))
