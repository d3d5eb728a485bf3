"""Check every image: python run/data/verify.py /my/images --output-dir verified

Writes bad_images.jsonl, clean.txt (trains directly) and summary.json. Exit code 0: all sound, 1: bad ones, 2: error."""

import sys

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.verify.args import get_args_parser


def main() -> int:
    args = get_args_parser().parse_args()
    from dinov2_custom.verify.main import main as verify

    try:
        return verify(args)
    except DINOv2Error as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
