"""Upstream's module for dino.txt; see ``elsewhere.py``."""

from dinov2_custom.hub.elsewhere import dinov2_vitl14_reg4_dinotxt_tet1280d20h24l, get_tokenizer

__all__ = ["dinov2_vitl14_reg4_dinotxt_tet1280d20h24l", "get_tokenizer"]
