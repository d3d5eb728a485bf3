"""Upstream's hub names for dino.txt, which this project does not provide. Each raises an error."""

from __future__ import annotations

from typing import Any, NoReturn

from dinov2_custom.hub.utils import refuse


def dinov2_vitl14_reg4_dinotxt_tet1280d20h24l(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise an error: dino.txt is not provided; the message says what to use instead."""
    refuse("dinov2_vitl14_reg4_dinotxt_tet1280d20h24l", "dino.txt's text tower", "dinov2_vitl14_reg for images")


def get_tokenizer(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise an error: dino.txt's tokenizer is not provided; the message says what to use instead."""
    refuse("dinov2_vitl14_reg4_dinotxt_tet1280d20h24l", "dino.txt's tokenizer", "dinov2_vitl14_reg for images")
