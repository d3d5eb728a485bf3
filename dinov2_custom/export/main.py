"""Export a trained backbone: load it, write beside the target, compare in the other library, move into place."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from dinov2_custom import cli
from dinov2_custom.errors import ConfigError
from dinov2_custom.export.card import write_card
from dinov2_custom.export.compare import check
from dinov2_custom.export.hugging_face import write_hugging_face
from dinov2_custom.export.onnx_file import write_onnx
from dinov2_custom.export.portable import portable
from dinov2_custom.export.push import open_hub, push
from dinov2_custom.export.rf_detr_folder import write_rf_detr
from dinov2_custom.export.timm_folder import write_timm
from dinov2_custom.export.upstream_shards import gather
from dinov2_custom.export.write import replacing, write_safetensors, write_torch
from dinov2_custom.teacher import load_teacher
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.run_folder import default_output, upstream_shards

_WRITERS = {
    "hf": (write_hugging_face, ""),
    "timm": (write_timm, ""),
    "torch": (write_torch, ".pth"),
    "safetensors": (write_safetensors, ".safetensors"),
    "onnx": (write_onnx, ".onnx"),
    "rf-detr": (write_rf_detr, ""),
}


def main(args: argparse.Namespace) -> int:
    """Run the export that ``args`` (``cli.export_parser``) describe and print what was written; return the exit code.

    Raises:
        ConfigError: the size, path or model cannot be exported, or the Hub refuses it.
        CheckpointError: the weights are unreadable, or the other library does not reproduce the features.
    """
    if args.normalize and args.to != "onnx":
        raise ConfigError(f"--normalize: expected --to onnx, whose graph it becomes a part of, got --to {args.to}")
    hub = open_hub(args.push) if args.push else None
    path = Path(args.output).expanduser() if args.output else default_path(args.source, args.to)
    if args.to == "torch" and (shards := upstream_shards(Path(args.source).expanduser())):
        if hub is not None:
            raise ConfigError(
                "--push: expected a backbone, got the shards of an upstream run; export the gathered file"
            )
        teacher = gather(shards, args.config_file, args.opts, args.allow_unknown_keys)
        with replacing(path, args.overwrite) as written:
            torch.save(teacher, written)
        heads = ", ".join(sorted({name.partition(".")[0] for name in teacher["teacher"]}))
        print(f"weights: {shards[0].name} to {shards[-1].name} in {args.source}: {heads}", file=sys.stderr)
        print(path)
        return 0
    teacher = load_teacher(args.source, args.config_file, args.opts, args.allow_unknown_keys)
    shown = without_credentials(teacher.weights)
    print(f"weights: {shown} (architecture from {teacher.described_by})", file=sys.stderr)
    model = portable(teacher, args.image_size)._replace(normalizes=args.normalize)
    print(export(model, args.to, path, args.overwrite), file=sys.stderr)
    print(f"card: {write_card(model, teacher, args.to, path)}", file=sys.stderr)
    if hub is not None:
        print(f"pushed: {push(hub, args.push, path)}", file=sys.stderr)
    print(path)
    return 0


def export(model, form: str, path: Path, overwrite: bool = False) -> str:
    """Write ``model`` (:func:`portable`) as ``form`` to ``path``; return a line on the comparison.

    ``path`` is created only after everything is written and compared.

    Raises:
        ConfigError: see :func:`main`.
        CheckpointError: tensors or features differ.
    """
    write, suffix = _WRITERS[form]
    with replacing(path, overwrite, suffix, folder=not suffix) as written:
        said = write(model, written)
        return said or check(model, form, written)


def default_path(source: str, form: str) -> Path:
    """Return ./outputs/export/<run or file>_<format> with the format's suffix."""
    given = Path(source).expanduser()
    folder = Path("outputs/export") / given.name if upstream_shards(given) else default_output("export", source)
    return folder.with_name(f"{folder.name}_{form}{_WRITERS[form][1]}")


if __name__ == "__main__":
    cli.main("export")
