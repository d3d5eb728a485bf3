"""Check, shrink, convert, tile and shard images:
python run/data/prepare.py /my/images --output-dir /my/shards --short-side 512 --format jpeg"""

import sys

try:
    from dinov2_custom.prepare.__main__ import main
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")

if __name__ == "__main__":
    sys.exit(main())
