"""Check every image: python run/data/verify.py /my/images --output-dir verified

Writes bad_images.jsonl, clean.txt (trains directly) and summary.json. Exit code 0: all sound, 1: bad ones, 2: error."""

import sys

try:
    from dinov2_custom.verify.__main__ import main
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")

if __name__ == "__main__":
    sys.exit(main())
