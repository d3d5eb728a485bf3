"""Features of a dataset: python run/embed.py <run or checkpoint> <folder or dataset string> [--output-dir DIR]"""

import sys

from dinov2_custom import entry
from dinov2_custom.run.embed import main

if __name__ == "__main__":
    sys.exit(entry.reported(main))
