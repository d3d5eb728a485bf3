"""Upstream's hub names for depth heads and dino.txt, which this project does not provide. Each raises an error."""

from __future__ import annotations

from typing import Any, NoReturn

from dinov2_custom.errors import DINOv2Error


def _refuse(name: str, part: str, instead: str) -> NoReturn:
    raise DINOv2Error(
        f"{name}: expected an image backbone or classifier, got {part}, which this project does not have; "
        f'use {instead} here, or in a process of its own torch.hub.load("facebookresearch/dinov2", "{name}")'
    )


def _depther(backbone: str, ending: str):
    name = f"{backbone}_{ending}"

    def depther(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name, "a depth head", f"{backbone} for features")

    depther.__name__ = depther.__qualname__ = name
    depther.__doc__ = f"Depth by {backbone}; not here: raises an error that says what to use."
    return depther


dinov2_vits14_ld = _depther("dinov2_vits14", "ld")
dinov2_vitb14_ld = _depther("dinov2_vitb14", "ld")
dinov2_vitl14_ld = _depther("dinov2_vitl14", "ld")
dinov2_vitg14_ld = _depther("dinov2_vitg14", "ld")
dinov2_vits14_dd = _depther("dinov2_vits14", "dd")
dinov2_vitb14_dd = _depther("dinov2_vitb14", "dd")
dinov2_vitl14_dd = _depther("dinov2_vitl14", "dd")
dinov2_vitg14_dd = _depther("dinov2_vitg14", "dd")


def dinov2_vitl14_reg4_dinotxt_tet1280d20h24l(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise an error: dino.txt is not provided; the message says what to use instead."""
    _refuse("dinov2_vitl14_reg4_dinotxt_tet1280d20h24l", "dino.txt's text tower", "dinov2_vitl14_reg for images")


def get_tokenizer(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise an error: dino.txt's tokenizer is not provided; the message says what to use instead."""
    _refuse("dinov2_vitl14_reg4_dinotxt_tet1280d20h24l", "dino.txt's tokenizer", "dinov2_vitl14_reg for images")
