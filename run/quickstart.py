"""Train on real photographs for a few minutes: python run/quickstart.py"""

import sys
from pathlib import Path

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(
        f"error: expected dinov2_custom in the environment of {sys.executable}, found none; activate the environment "
        "that has it, or `pip install -c constraints.txt -e .` in the root of the repository"
    )
from dinov2_custom.quickstart.args import get_args_parser

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"

if __name__ == "__main__":
    sys.exit(
        entry.run(
            "dinov2_custom.quickstart.main", get_args_parser(config_file=str(RECIPE)).parse_args(), quiet_threads=True
        )
    )
