"""Write tensor files in the released weights' layout, and manage the output path of an export."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.errors import ConfigError
from dinov2_custom.export.portable import Portable
from dinov2_custom.files import is_utf8, utf8_path
from dinov2_custom.reading import to_facts

EXPORTED = {  # all files of an exported folder
    *("model.safetensors", "config.json", "preprocessor_config.json"),
    *("README.md", "curves.png"),  # see card.py
    *("decoder.json", "scores.json"),  # of a trained decoder
}


def write_torch(model: Portable, path: Path) -> None:
    """Save a flat dict of tensors, as in the released .pth files, for ``load_state_dict`` of a ViT without chunks.

    Facts about its input images are stored in ``_metadata[""]``, the metadata of state dicts.
    """
    state = OrderedDict(model.state)
    if facts := to_facts(model.reading):
        state._metadata = {"": facts}
    torch.save(state, path)


def write_safetensors(model: Portable, path: Path) -> None:
    """Save the tensors of :func:`write_torch` as safetensors; the facts are in the header's metadata, as JSON."""
    save_safetensors(model.state, path, to_facts(model.reading))


def save_safetensors(state: dict[str, Tensor], path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Save ``state`` with the header that transformers asks for, and ``facts``."""
    texts = {name: json.dumps(fact) for name, fact in (facts or {}).items()}
    save_file(state, path, metadata={"format": "pt"} | texts)


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool, suffix: str = "", folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` for a file or folder, and move it to ``path`` if the body succeeds.

    Args:
        suffix: suffix of the temporary path, which may determine the file format.
        overwrite, folder: see :func:`make_room`, whose errors apply.
    """
    partial = make_room(path, overwrite, folder)
    name = path.name if is_utf8(path.name) else "model"
    written = partial / (name if name.endswith(suffix) else name + suffix)
    try:
        if folder:
            written.mkdir()
        with utf8_path(partial) as plain:
            yield plain / written.name
        remove(path)
        for beside in partial.iterdir():  # ONNX above 2 GB stores its tensors in a second file, referred to by name
            if beside != written:
                beside.replace(path.parent / beside.name)
        written.rename(path)
    finally:
        remove(partial)


def make_room(path: Path, overwrite: bool, folder: bool) -> Path:
    """Return a new folder beside ``path`` in which to write; an empty folder may exist at ``path``.

    Args:
        overwrite: an earlier export of the same kind may also exist there.
        folder: the export is a folder, not a file.

    Raises:
        ConfigError: something else exists at ``path``, or it is not writable.
    """
    check_output_dir(path.parent, "--output")
    inside = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if others := [name for name in inside if not folder or name not in EXPORTED]:
        found = f"a folder with {', '.join(others[:5])}; choose another"
    elif folder and path.is_file():
        found = "a file; choose another"
    elif (inside or path.is_file()) and not overwrite:
        found = "an earlier result; choose another, or --overwrite"
    else:
        found = None
    if found:
        raise ConfigError(f"--output: expected nothing at {path}, found {found}")
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    partial.mkdir(parents=True)
    return partial


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
