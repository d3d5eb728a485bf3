"""Command line of the export, without torch, so that --help is instant."""

from __future__ import annotations

import argparse

from dinov2_custom.commands import command
from dinov2_custom.teacher_args import add_configuration, teacher_parser

FORMATS = {
    "hf": "folder for transformers: AutoModel.from_pretrained, AutoImageProcessor.from_pretrained",
    "timm": "folder for timm: timm.create_model('local-dir:<folder>')",
    "torch": "one .pth in the layout of the released DINOv2 weights",
    "safetensors": "the same tensors as one .safetensors",
    "onnx": "one .onnx for any batch size: image -> cls_token, patch_tokens",
}


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of ``run/export/export.py``."""
    parser = teacher_parser(
        "Write a trained backbone for another library, load it there and compare the features."
        "\n\nformats:\n" + "\n".join(f"  {name:12} {text}" for name, text in FORMATS.items()),
        "source",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog=command("run/export/export.py"),
    )
    parser.add_argument("--to", required=True, choices=list(FORMATS), help="format, see above")
    parser.add_argument(
        "--output",
        "--output-dir",
        "--output_dir",
        default="",
        metavar="PATH",
        help="folder or file to write (default: ./outputs/export/<name of the run>_<format>)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="side that the exported positions are sized for, a multiple of the patch size (default: that of training)",
    )
    parser.add_argument(
        "--normalize",
        action="store_true",
        help="with --to onnx: put the normalization of images (0..1 -> mean 0, deviation 1) into the graph",
    )
    add_configuration(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at the output path")
    return parser
