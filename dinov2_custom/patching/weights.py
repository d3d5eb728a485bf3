"""Load existing weights into a checkout's student."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dinov2_custom.teacher import load_pretrained_backbone

# for checkouts from before registers, whose backbones have no resampling attributes
_RESAMPLING = {"interpolate_antialias": False, "interpolate_offset": 0.1}


def with_flexible_weights(original: Callable) -> Callable:
    """Return an ``SSLMetaArch.__init__`` that loads ``student.pretrained_weights`` of any layout, or raises.

    The teacher is still initialised later as a copy of the student.
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
