"""The backbone for X-ray images. ``weights``: path or URL of the user's copy of the file."""

from __future__ import annotations

from dinov2_custom.hub.backbones import Weights, make_by_file


def xray_dino_vitl16(*, pretrained: bool = True, weights: Weights | str = Weights.XRAY_DINO, **kwargs):
    """Build ViT-L/16 at 512 pixels for X-ray images."""
    own = {"img_size": 512, "patch_size": 16, "interpolate_offset": 0.1}
    options = {"pretrained": pretrained, "weights": weights, "sha256": "ad31c2b0"}
    return make_by_file("xray_dino_vitl16", "vit_large", own, **(options | kwargs))
