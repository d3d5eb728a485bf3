"""Import a checkout in this process, with stand-ins for its dependencies, and remove both afterwards."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
import warnings
from pathlib import Path

import torch

from dinov2_custom.patching.checkout import plan, write
from dinov2_custom.patching.main import patches_folder
from dinov2_custom.patching.patch_file import read_series

_IN_THE_WAY = ("dinov2", "xformers", "fvcore", "torchvision", "submitit", "torchmetrics")


def patched(checkout: Path, *names: str) -> Path:
    """Apply the patches called ``names`` (none: all) to ``checkout``; return it."""
    series = read_series(patches_folder())
    chosen = [patch for patch in series if patch.name in names] if names else series
    for path, (_, content) in plan(checkout, series, chosen, revert=False).items():
        write(path, content)
    return checkout


class _Finder:
    def __init__(self, root: Path):
        self.root = root

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "dinov2":
            return None
        return importlib.machinery.PathFinder.find_spec(name, [str(self.root)] if path is None else path)


@contextlib.contextmanager
def world(checkout: Path, extra: dict | None = None):
    """Yield a function that imports ``dinov2.<name>`` of ``checkout``; ``extra``: more modules to be found."""
    from tests.patches import stand_ins

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in _IN_THE_WAY}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    finder = _Finder(checkout)
    sys.modules.update(stand_ins.modules() | (extra or {}))
    sys.meta_path.insert(0, finder)
    sys.dont_write_bytecode, written = True, sys.dont_write_bytecode
    importlib.invalidate_caches()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield lambda name: importlib.import_module(f"dinov2.{name}")
    finally:
        sys.dont_write_bytecode = written
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in _IN_THE_WAY]:
            del sys.modules[name]
        sys.modules.update(before)
        torch.backends.cuda.matmul.allow_tf32 = tf32
