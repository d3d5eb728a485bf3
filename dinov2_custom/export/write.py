"""Files of tensors in the released weights' layout, and where an export goes. Read :func:`write_torch` first."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2_custom.configs.paths import check_output_dir
from dinov2_custom.errors import ConfigError
from dinov2_custom.export.portable import Portable

EXPORTED = {"model.safetensors", "config.json", "preprocessor_config.json"}  # all that an exported folder has


def write_torch(model: Portable, path: Path) -> None:
    """Save a flat dict of tensors, as the released .pth files hold: for ``load_state_dict`` of a ViT without chunks."""
    torch.save(model.state, path)


def write_safetensors(model: Portable, path: Path) -> None:
    """Save the tensors of :func:`write_torch` as safetensors."""
    save_safetensors(model.state, path)


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """Save ``state`` with the header that transformers asks for."""
    save_file(state, path, metadata={"format": "pt"})


def make_room(path: Path, overwrite: bool, folder: bool) -> Path:
    """Return a new folder beside ``path`` to write into before its files are moved; an empty folder may be at ``path``.

    Args:
        overwrite: an earlier export of the same kind may be there, too.
        folder: a folder will be written, and not a file.

    Raises:
        ConfigError: something else is at ``path``, or nothing can be written there.
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
    """Remove a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
