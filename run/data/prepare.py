"""Check, shrink, convert, tile and shard images:
python run/data/prepare.py /my/images --output-dir /my/shards --short-side 512 --format jpeg"""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
from dinov2_custom.prepare.args import get_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.prepare.main", get_args_parser().parse_args(), error_code=2))
