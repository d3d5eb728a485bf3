"""Train on real photographs for a few minutes: python run/quickstart.py"""

import sys
from pathlib import Path

from dinov2_custom import entry
from dinov2_custom.quickstart.args import get_args_parser

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"

if __name__ == "__main__":
    sys.exit(
        entry.run(
            "dinov2_custom.quickstart.main", get_args_parser(config_file=str(RECIPE)).parse_args(), quiet_threads=True
        )
    )
