"""Features of a dataset: python run/embed.py <run or checkpoint> <folder or dataset string> [--output-dir DIR]"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
from dinov2_custom.run.embed import main

if __name__ == "__main__":
    entry.leave(entry.reported(main))
