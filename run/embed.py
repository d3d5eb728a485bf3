"""Features of a dataset: python run/embed.py <run or checkpoint> <folder or dataset string> [--output-dir DIR]"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(
        f"error: expected dinov2_custom in the environment of {sys.executable}, found none; activate the environment "
        "that has it, or `pip install -c constraints.txt -e .` in the root of the repository"
    )
from dinov2_custom.run.embed import main

if __name__ == "__main__":
    sys.exit(entry.reported(main))
