"""Fix a checkout of upstream: python run/patches/apply.py <checkout> [--only a,b] [--revert] [--status] [--diff]"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
from dinov2_custom.patching.args import get_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.patching.main", get_args_parser().parse_args()))
