"""Write a trained backbone for another library: python run/export/export.py out --to hf|timm|torch|onnx|safetensors"""

import sys

from dinov2_custom import entry
from dinov2_custom.export.args import get_args_parser

if __name__ == "__main__":
    sys.exit(entry.run("dinov2_custom.export.main", get_args_parser().parse_args()))
