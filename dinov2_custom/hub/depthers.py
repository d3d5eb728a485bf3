"""Upstream's hub names for depth heads, which this project does not provide. Each raises an error."""

from __future__ import annotations

from typing import Any, NoReturn

from dinov2_custom.hub.utils import named, refuse


def _depther(backbone: str, ending: str):
    name = f"{backbone}_{ending}"

    def depther(*args: Any, **kwargs: Any) -> NoReturn:
        refuse(name, "a depth head", f"{backbone} for features")

    return named(depther, name, f"Depth by {backbone}; not here: raises an error that says what to use.")


dinov2_vits14_ld = _depther("dinov2_vits14", "ld")
dinov2_vitb14_ld = _depther("dinov2_vitb14", "ld")
dinov2_vitl14_ld = _depther("dinov2_vitl14", "ld")
dinov2_vitg14_ld = _depther("dinov2_vitg14", "ld")
dinov2_vits14_dd = _depther("dinov2_vits14", "dd")
dinov2_vitb14_dd = _depther("dinov2_vitb14", "dd")
dinov2_vitl14_dd = _depther("dinov2_vitl14", "dd")
dinov2_vitg14_dd = _depther("dinov2_vitg14", "dd")
