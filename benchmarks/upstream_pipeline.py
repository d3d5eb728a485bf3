"""Upstream's augmentation and collate classes, unmodified: the wheel's files together with torchvision.

The registry's Linux wheel of torchvision does not load its compiled operators next to a CPU build of torch. None of
them is used here, but its import requires them, so they are declared without a body. Everything is downloaded to
git-ignored folders on first use.
"""

from __future__ import annotations

import importlib
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from tests.oracle import ensure_oracle

TORCHVISION = Path(__file__).resolve().parents[1] / "build" / "benchmark_torchvision"


class Upstream(NamedTuple):
    """Upstream's pipeline: ``augment(PIL image)`` gives the crops, ``collate(samples)`` the batch in half precision,
    with masks of ``masks(number of patches)``."""

    augment: object
    collate: object
    masks: object
    versions: str


def load() -> Upstream:
    """Return upstream's pipeline with its default configuration (ViT-L/16 recipe: 2 x 224, 8 x 96)."""
    torchvision = import_torchvision()
    package = ModuleType("upstream_data")
    package.__path__ = [str(ensure_oracle() / "dinov2" / "data")]
    sys.modules["upstream_data"] = package
    names = ("augmentations", "collate", "masking")
    augmentations, collate, masking = (importlib.import_module(f"upstream_data.{name}") for name in names)
    masks = masking.MaskingGenerator((16, 16), max_num_patches=0.5 * 224 // 14 * 224 // 14)

    def collate_batch(samples):
        return collate.collate_data_and_cast(samples, (0.1, 0.5), 0.5, torch.half, 256, masks)

    augment = augmentations.DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 8)
    return Upstream(augment, collate_batch, masks, f"torchvision={torchvision.__version__}")


def import_torchvision() -> ModuleType:
    """Import torchvision from its own folder, installing it there first."""
    if not (TORCHVISION / "torchvision").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(TORCHVISION)]
        subprocess.run([*command, "torchvision"], check=True)
    sys.path.append(str(TORCHVISION))
    wanted = (TORCHVISION / "torchvision" / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted({*re.findall(r'register_meta\("(\w+)"', wanted), *re.findall(r"torchvision::(\w+)", wanted)}):
        library.define(f"{name}(Tensor x) -> Tensor")
    import torchvision
    import torchvision.transforms

    torchvision._operators = library  # they live as long as it does
    return torchvision


def seed(number: int) -> None:
    """Seed the two global generators that upstream uses."""
    random.seed(number)
    torch.manual_seed(number)
