# PYTHON_ARGCOMPLETE_OK
"""``python -m dinov2_custom COMMAND ...`` runs the scripts of ``run/`` without a checkout."""

import sys

from dinov2_custom.cli import main

if __name__ == "__main__":
    # keep the command as typed for logs and job scripts; run by path, this file would shadow Python's logging with ours
    sys.argv[:1] = ["-m", "dinov2_custom"]
    main(None, sys.argv[2:])
