"""The eight released classifiers: a backbone and a linear layer over its class tokens and mean patch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.hub.backbones import Weights as BackboneWeights
from dinov2_custom.hub.backbones import make_backbone
from dinov2_custom.hub.utils import model_name, named, released_file
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.weights import read_weights


class Weights(Enum):
    """Released linear layers, named after their training data."""

    IMAGENET1K = "IMAGENET1K"


class LinearClassifierWrapper(nn.Module):
    """Compute class logits of images (B, C, H, W).

    With ``layers`` 1 the input of the linear layer is the class token and the mean patch of the last block; with 4 the
    class tokens of the last four, and the same mean patch.
    """

    def __init__(self, *, backbone: nn.Module, linear_head: nn.Module, layers: int = 4) -> None:
        super().__init__()
        self.backbone, self.linear_head, self.layers = backbone, linear_head, layers

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        blocks = self.backbone.get_intermediate_layers(x, n=self.layers, return_class_token=True)
        class_tokens = [class_token for _, class_token in blocks]
        return self.linear_head(torch.cat([*class_tokens, blocks[-1][0].mean(dim=1)], dim=1))


_LinearClassifierWrapper = LinearClassifierWrapper  # upstream's name


def make_classifier(
    arch: str,
    *,
    registers: bool = False,
    layers: int = 4,
    pretrained: bool = True,
    weights: Weights | str | os.PathLike = Weights.IMAGENET1K,
    backbone_weights: BackboneWeights | str | os.PathLike = BackboneWeights.LVD142M,
    **kwargs: Any,
) -> LinearClassifierWrapper:
    """Build a classifier, as upstream's hub does.

    Args:
        layers: 1 or 4, the number of blocks whose tokens the linear layer uses.
        weights: ``IMAGENET1K``, or a path or URL of a file with the linear layer's ``weight`` and ``bias``.
        backbone_weights, kwargs: passed to :func:`make_backbone`.

    Raises:
        ConfigError: ``layers`` is neither 1 nor 4.
        CheckpointError: the weights cannot be loaded or do not fit.
    """
    if layers not in (1, 4):
        raise ConfigError(f"layers: expected 1 or 4, got {layers}")
    backbone = make_backbone(arch, registers=registers, pretrained=pretrained, weights=backbone_weights, **kwargs)
    width = (1 + layers) * backbone.embed_dim
    if not pretrained:
        return LinearClassifierWrapper(backbone=backbone, linear_head=nn.Linear(width, 1000), layers=layers)
    file = weights
    if weights is Weights.IMAGENET1K or str(weights) == Weights.IMAGENET1K.value:
        file = released_file(arch, 4 if registers else 0, f"linear{layers if layers > 1 else ''}_head")
    head = _read_head(file, width)
    return LinearClassifierWrapper(backbone=backbone, linear_head=head.to(backbone.cls_token.device), layers=layers)


def _read_head(file: str | os.PathLike, width: int) -> nn.Linear:
    state = read_weights(file)
    shapes = (
        {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    )
    if set(shapes) != {"weight", "bias"} or len(shapes["weight"]) != 2 or shapes["weight"][1] != width:
        raise CheckpointError(
            f"weights: expected a linear layer's weight (classes, {width}) and bias, got {shapes or 'no tensors'} in "
            f"{without_credentials(file)}; check layers= and the architecture"
        )
    head = nn.Linear(width, shapes["weight"][0])
    head.load_state_dict(state)
    return head


def _released(arch: str, registers: bool, name: str) -> Callable[..., LinearClassifierWrapper]:
    def build(*, layers: int = 4, pretrained: bool = True, weights: Weights | str = Weights.IMAGENET1K, **kwargs):
        options = {"registers": registers, "layers": layers, "pretrained": pretrained, "weights": weights}
        return make_classifier(arch, **options, **kwargs)

    doc = f"{name}{' with registers' * registers} and a linear layer (1 or 4 ``layers``)."
    return named(build, f"{model_name(arch)}{'_reg' * registers}_lc", doc)


dinov2_vits14_lc = _released("vit_small", False, "ViT-S/14")
dinov2_vitb14_lc = _released("vit_base", False, "ViT-B/14")
dinov2_vitl14_lc = _released("vit_large", False, "ViT-L/14")
dinov2_vitg14_lc = _released("vit_giant2", False, "ViT-g/14")
dinov2_vits14_reg_lc = _released("vit_small", True, "ViT-S/14")
dinov2_vitb14_reg_lc = _released("vit_base", True, "ViT-B/14")
dinov2_vitl14_reg_lc = _released("vit_large", True, "ViT-L/14")
dinov2_vitg14_reg_lc = _released("vit_giant2", True, "ViT-g/14")
