"""``python -m dinov2_custom COMMAND ...``: what the scripts in ``run/`` do, where there is no checkout."""

import sys

from dinov2_custom.cli import main

if __name__ == "__main__":
    # logs and job scripts show it as it was typed: by its path, this file would hide Python's logging behind ours
    sys.argv[:1] = ["-m", "dinov2_custom"]
    main(None, sys.argv[2:])
