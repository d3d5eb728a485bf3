"""Backbones for cell images, with one channel per stain. ``weights``: path or URL of the user's copy of the file."""

from __future__ import annotations

from dinov2_custom.hub.backbones import make_by_file


def cell_dino_cp_vits8(*, pretrained: bool = True, weights: str | None = None, **kwargs):
    """Build ViT-S/8 at 128 pixels for the five channels of Cell Painting."""
    own = {"img_size": 128, "patch_size": 8, "in_chans": 5}
    return make_by_file("cell_dino_cp_vits8", "vit_small", own, pretrained=pretrained, weights=weights, **kwargs)


def cell_dino_hpa_vitl16(*, pretrained: bool = True, weights: str | None = None, **kwargs):
    """Build ViT-L/16 for the four channels of the Human Protein Atlas."""
    own = {"img_size": 224, "patch_size": 16, "in_chans": 4}
    return make_by_file("cell_dino_hpa_vitl16", "vit_large", own, pretrained=pretrained, weights=weights, **kwargs)


def cell_dino_hpa_vitl14(*, pretrained: bool = True, weights: str | None = None, **kwargs):
    """Build ViT-L/14 for the four channels of the Human Protein Atlas."""
    own = {"img_size": 518, "patch_size": 14, "in_chans": 4}
    return make_by_file("cell_dino_hpa_vitl14", "vit_large", own, pretrained=pretrained, weights=weights, **kwargs)


def channel_adaptive_dino_vitl16(*, pretrained: bool = True, weights: str | None = None, **kwargs):
    """Build ViT-L/16 for any number of channels: a bag of channels, see ``get_intermediate_layers``."""
    own = {"img_size": 224, "patch_size": 16, "in_chans": 1, "channel_adaptive": True}
    name = "channel_adaptive_dino_vitl16"
    return make_by_file(name, "vit_large", own, pretrained=pretrained, weights=weights, **kwargs)
