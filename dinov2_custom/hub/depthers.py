"""Upstream's module for depth heads; see ``elsewhere.py``."""

from dinov2_custom.hub.elsewhere import (
    dinov2_vitb14_dd,
    dinov2_vitb14_ld,
    dinov2_vitg14_dd,
    dinov2_vitg14_ld,
    dinov2_vitl14_dd,
    dinov2_vitl14_ld,
    dinov2_vits14_dd,
    dinov2_vits14_ld,
)

__all__ = [
    "dinov2_vitb14_dd",
    "dinov2_vitb14_ld",
    "dinov2_vitg14_dd",
    "dinov2_vitg14_ld",
    "dinov2_vitl14_dd",
    "dinov2_vitl14_ld",
    "dinov2_vits14_dd",
    "dinov2_vits14_ld",
]
