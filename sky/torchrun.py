"""torchrun, except for its exit code: ``python -m dinov2_custom.run.local``, for tasks that still name this file."""

import sys

from dinov2_custom.run.local import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:])[0])
