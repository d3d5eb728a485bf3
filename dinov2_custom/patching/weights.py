"""Existing weights for a checkout's student. Read :func:`with_flexible_weights`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dinov2_custom.teacher import load_pretrained_backbone

# of checkouts from before registers, whose backbones do not say how they resample positions
_RESAMPLING = {"interpolate_antialias": False, "interpolate_offset": 0.1}


def with_flexible_weights(original: Callable) -> Callable:
    """Return an ``SSLMetaArch.__init__`` that reads ``student.pretrained_weights`` of any layout, or refuses them.

    The teacher starts as a copy of the student later, as always.
    """

    @functools.wraps(original)
    def __init__(self: Any, cfg: Any, *args: Any, **options: Any) -> None:
        path = cfg.student.pretrained_weights
        cfg.student.pretrained_weights = ""
        try:
            original(self, cfg, *args, **options)
        finally:
            cfg.student.pretrained_weights = path
        if path:
            backbone = self.student["backbone"]
            for name, value in _RESAMPLING.items():
                if not hasattr(backbone, name):
                    setattr(backbone, name, value)
            load_pretrained_backbone(backbone, path)

    return __init__
