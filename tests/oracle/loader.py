"""Import upstream's ``dinov2`` from a folder and leave no trace: afterwards neither ``dinov2`` nor any stand-in is in
``sys.modules``, so that ``dinov2_custom`` (which looks for xformers, and may itself answer to that name) never
sees them.

Upstream's files are not edited; ``dinov2.data`` and ``dinov2.train`` are entered without their ``__init__``, which
would import torchvision. Read :func:`load_oracle` first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from tests.oracle import stand_ins

NAMES_IN_THE_WAY = ("dinov2", "xformers", "fvcore")


@functools.cache
def load_oracle(root: Path) -> SimpleNamespace:
    """Return upstream's modules from ``root/dinov2``, imported once a process.

    Attributes: arch (train.ssl_meta_arch), train, vits, models, configs, config_utils, head, dino_loss, ibot_loss,
    koleo_loss, collate, masking, param_groups, utils (CosineScheduler), fsdp, distributed.
    """
    finder = _Finder(root)
    with _isolated_modules(finder), _unchanged_tf32(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of another package's 2023 code
        collate = importlib.import_module("dinov2.data.collate")
        masking = importlib.import_module("dinov2.data.masking")
        data = sys.modules["dinov2.data"]
        data.collate_data_and_cast, data.MaskingGenerator = collate.collate_data_and_cast, masking.MaskingGenerator
        data.SamplerType = data.make_data_loader = data.make_dataset = data.DataAugmentationDINO = None
        names = dict(
            arch="train.ssl_meta_arch",
            train="train.train",
            vits="models.vision_transformer",
            models="models",
            configs="configs",
            config_utils="utils.config",
            head="layers.dino_head",
            dino_loss="loss.dino_clstoken_loss",
            ibot_loss="loss.ibot_patch_loss",
            koleo_loss="loss.koleo_loss",
            param_groups="utils.param_groups",
            utils="utils.utils",
            fsdp="fsdp",
            distributed="distributed",
        )
        loaded = {key: importlib.import_module(f"dinov2.{name}") for key, name in names.items()}
    oracle = SimpleNamespace(collate=collate, masking=masking, **loaded)
    _adapt_to_one_cpu(oracle)
    return oracle


def _adapt_to_one_cpu(oracle: SimpleNamespace) -> None:
    """Rebind, inside upstream's modules only, the names that need a GPU or a process group."""
    arch = oracle.arch
    arch.get_fsdp_wrapper = lambda model_cfg, modules_to_wrap=(): _with_clip
    arch.get_fsdp_modules = lambda module: [SimpleNamespace(params=list(module.parameters()))]
    arch.reshard_fsdp_model = lambda module: None
    # its sinkhorn sums the number of masked patches over a group without asking whether there is one
    oracle.ibot_loss.dist = SimpleNamespace(is_initialized=lambda: False, all_reduce=lambda tensor: None)


def _with_clip(module: torch.nn.Module) -> torch.nn.Module:
    """FSDP's wrapper for one process: the module itself, with FSDP's method for clipping."""
    module.clip_grad_norm_ = lambda max_norm: torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    return module


class _Finder:
    """Answer for ``dinov2`` and all below it, from one folder, before any other finder."""

    WITHOUT_INIT = ("dinov2.data", "dinov2.train")

    def __init__(self, root: Path):
        self.root = root

    def find_spec(self, name, path=None, target=None):
        if name != "dinov2" and not name.startswith("dinov2."):
            return None
        if name in self.WITHOUT_INIT:
            spec = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
            spec.submodule_search_locations = [str(self.root.joinpath(*name.split(".")))]
            return spec
        return importlib.machinery.PathFinder.find_spec(name, [str(self.root)] if path is None else path)


@contextlib.contextmanager
def _isolated_modules(finder: _Finder):
    """Give the body a ``sys.modules`` without the names in the way, and afterwards put back exactly what was there."""
    before = _taken_out()
    sys.modules.update(stand_ins.modules())
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _taken_out()
        sys.modules.update(before)


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.split(".")[0] in NAMES_IN_THE_WAY]
    return {name: sys.modules.pop(name) for name in names}


@contextlib.contextmanager
def _unchanged_tf32():
    """Upstream allows TF32 for the whole process when imported."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
