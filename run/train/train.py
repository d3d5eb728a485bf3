"""Train: python run/train/train.py --config-file configs/vits.yaml --output-dir out train.dataset_path=/my/images"""

import sys

from dinov2_custom import entry
from dinov2_custom.train.args import get_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.train.train", get_args_parser().parse_args(), quiet_threads=True))
