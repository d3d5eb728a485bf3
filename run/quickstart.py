"""Train on real photographs for a few minutes: python run/quickstart.py"""

import sys
from pathlib import Path

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
from dinov2_custom.quickstart.args import get_args_parser

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "small.yaml"

if __name__ == "__main__":
    sys.exit(
        entry.run(
            "dinov2_custom.quickstart.main", get_args_parser(config_file=str(RECIPE)).parse_args(), quiet_threads=True
        )
    )
