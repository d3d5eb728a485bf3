"""Packages that only some users need: imported when they are, or one sentence that says how to install them.

Read :func:`optional` first.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from dinov2_custom.errors import ConfigError, DINOv2Error

OF_EXTRA = {  # module -> (its package, the extra in pyproject.toml that brings it)
    "fvcore": ("fvcore", "fvcore"),
    "imagecodecs": ("imagecodecs", "slides"),
    "iopath": ("iopath", "iopath"),
    "matplotlib": ("matplotlib", "plots"),
    "onnx": ("onnx", "export"),
    "onnxscript": ("onnxscript", "export"),
    "pyarrow": ("pyarrow", "parquet"),
    "simplejpeg": ("simplejpeg", "fast"),
    "skimage": ("scikit-image", "quickstart"),
    "sklearn": ("scikit-learn", "eval"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "tifffile": ("tifffile", "slides"),
    "wandb": ("wandb", "wandb"),
}


def optional(name: str, purpose: str, error: type[DINOv2Error] = ConfigError, otherwise: str = "") -> ModuleType:
    """Import and return module ``name``, in or below a key of ``OF_EXTRA``.

    Args:
        purpose: what needs it, the beginning of the sentence.
        otherwise: what to do instead, its end.

    Raises:
        DINOv2Error: of class ``error``, when it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise error(missing(name, purpose, otherwise, f"got none ({e})")) from e


def class_of_torchvision(module: str, name: str, otherwise: type) -> type:
    """Return torchvision's class, for ours to be told by users' ``isinstance``; ``otherwise`` without torchvision.

    Nothing of it is used. A torchvision that was built for another torch is like none.
    """
    try:
        return getattr(importlib.import_module(f"torchvision.{module}"), name)
    except (ImportError, OSError, RuntimeError):
        return otherwise


def missing(name: str, purpose: str, otherwise: str = "", got: str = "got none") -> str:
    """Return the sentence for ``purpose`` without module ``name``, and what to do."""
    package = OF_EXTRA[name.partition(".")[0]][0]
    return f"{purpose}: expected the package {package}, {got}; {install(name)}{otherwise and f', or {otherwise}'}"


def install(name: str) -> str:
    """Return the command that installs module ``name`` where this package is installed already."""
    return f"pip install 'dinov2_custom[{OF_EXTRA[name.partition('.')[0]][1]}]'"
