"""Fix a checkout of upstream: python run/patches/apply.py <checkout> [--only a,b] [--revert] [--status] [--diff]"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(
        f"error: expected dinov2_custom in the environment of {sys.executable}, found none; activate the environment "
        "that has it, or `pip install -c constraints.txt -e .` in the root of the repository"
    )
from dinov2_custom.patching.args import get_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.patching.main", get_args_parser().parse_args()))
