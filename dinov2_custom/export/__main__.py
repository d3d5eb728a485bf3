"""``python -m dinov2_custom.export``, and what ``run/export/export.py`` calls. Torch-free itself."""

import sys

from dinov2_custom import entry
from dinov2_custom.export.args import get_args_parser


def main() -> int:
    """Parse the command line, do what it says, and return the exit code."""
    return entry.run("dinov2_custom.export.main", get_args_parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
