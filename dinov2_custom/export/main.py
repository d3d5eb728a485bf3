"""Export a trained backbone: load, write beside the target, compare in the other library, move into place.

Read :func:`main`.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from dinov2_custom.export.compare import check
from dinov2_custom.export.hugging_face import write_hugging_face
from dinov2_custom.export.onnx_file import write_onnx
from dinov2_custom.export.portable import portable
from dinov2_custom.export.timm_folder import write_timm
from dinov2_custom.export.write import make_room, remove, write_safetensors, write_torch
from dinov2_custom.teacher import load_teacher
from dinov2_custom.utils.run_folder import default_output

__all__ = ["export", "main"]
_WRITERS = {
    "hf": (write_hugging_face, ""),
    "timm": (write_timm, ""),
    "torch": (write_torch, ".pth"),
    "safetensors": (write_safetensors, ".safetensors"),
    "onnx": (write_onnx, ".onnx"),
}


def main(args: argparse.Namespace) -> int:
    """Do what ``args`` (``export.args``) ask for and say what was written; return the exit code.

    Raises:
        ConfigError: a size, path or model that cannot be exported.
        CheckpointError: unreadable weights, or features that the other library does not reproduce.
    """
    path = Path(args.output).expanduser() if args.output else _default_path(args.source, args.to)
    teacher = load_teacher(args.source, args.config_file, args.opts, args.allow_unknown_keys)
    print(f"weights: {teacher.weights} (architecture from {teacher.described_by})", file=sys.stderr)
    print(export(portable(teacher, args.image_size), args.to, path, args.overwrite), file=sys.stderr)
    print(path)
    return 0


def export(model, form: str, path: Path, overwrite: bool = False) -> str:
    """Write ``model`` (:func:`portable`) as ``form`` to ``path``; return a line on the comparison.

    Nothing is at ``path`` before all is written and compared.

    Raises:
        ConfigError: see :func:`main`.
        CheckpointError: the features differ.
    """
    write, suffix = _WRITERS[form]
    partial = make_room(path, suffix, overwrite)
    try:
        if not suffix:
            partial.mkdir()
        write(model, partial)
        said = check(model, form, partial)
        remove(path)
        partial.rename(path)
    finally:
        remove(partial)
    return said


def _default_path(source: str, form: str) -> Path:
    """Return ./outputs/export/<run or file>_<format> with the format's suffix."""
    folder = default_output("export", source)
    return folder.with_name(f"{folder.name}_{form}{_WRITERS[form][1]}")


if __name__ == "__main__":
    runpy.run_module("dinov2_custom.export", run_name="__main__")
