"""Fix a checkout of upstream: python run/patches/apply.py <checkout> [--only a,b] [--revert] [--status] [--diff]"""

import sys

from dinov2_custom import entry
from dinov2_custom.patching.args import get_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.patching.main", get_args_parser().parse_args()))
