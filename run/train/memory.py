"""Does it fit on my GPU? python run/train/memory.py --config-file configs/vitl.yaml --fits 40

Counts the memory of a training step on tensors without data, in seconds, on a machine without a GPU."""

import sys

try:
    from dinov2_custom import entry
except ModuleNotFoundError:
    sys.exit(f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`")
from dinov2_custom.train.args import get_memory_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.train.memory", get_memory_args_parser().parse_args()))
