"""DINOv2 pretraining on your own unlabeled images. Start reading at ``dinov2_custom.train.train.do_train``.

The functions of ``api.py`` are attributes of this package, imported on first use.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2_custom.api import Embedding, Run, embed, export, knn, load, pretrain

__version__ = "0.1.0"
__all__ = ["Embedding", "Run", "embed", "export", "knn", "load", "pretrain"]


class CallableModule(ModuleType):
    """A package with the name of a function of ``api.py``, which calling it calls: ``dinov2_custom.embed(...)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(f"{__name__}.api"), name)(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
