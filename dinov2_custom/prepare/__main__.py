"""``python -m dinov2_custom.prepare``, and what ``run/data/prepare.py`` calls. Torch-free itself."""

import sys

from dinov2_custom import entry
from dinov2_custom.prepare.args import get_args_parser


def main() -> int:
    """Parse the command line, do what it says, and return the exit code."""
    return entry.run("dinov2_custom.prepare.main", get_args_parser().parse_args(), error_code=2)


if __name__ == "__main__":
    sys.exit(main())
