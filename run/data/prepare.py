"""Check, shrink, convert, tile and shard images:
python run/data/prepare.py /my/images --output-dir /my/shards --short-side 512 --format jpeg"""

import sys

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.prepare.args import get_args_parser


def main() -> int:
    args = get_args_parser().parse_args()
    from dinov2_custom.prepare.main import main as prepare

    try:
        return prepare(args)
    except DINOv2Error as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
