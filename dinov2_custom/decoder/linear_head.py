"""Semantic segmentation by one linear layer on the patch features, as a model of transformers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import load_backbone
from transformers.modeling_outputs import SemanticSegmenterOutput


class LinearSegmenterConfig(PreTrainedConfig):
    """The backbone's configuration and the classes."""

    model_type = "dinov2_linear_segmenter"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        super().__post_init__(**kwargs)


class LinearSegmenter(PreTrainedModel):
    """Batch normalisation and a 1x1 convolution on the last patch features, upsampled to the image."""

    config: LinearSegmenterConfig
    config_class = LinearSegmenterConfig
    main_input_name = "pixel_values"

    def __init__(self, config: LinearSegmenterConfig) -> None:
        super().__init__(config)
        self.backbone = load_backbone(config)
        self.norm = nn.BatchNorm2d(self.backbone.channels[-1])
        self.classifier = nn.Conv2d(self.backbone.channels[-1], config.num_labels, kernel_size=1)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> SemanticSegmenterOutput:
        """Return logits (B, K, H, W) of images (B, C, H, W)."""
        features = self.backbone(pixel_values).feature_maps[-1]
        logits = self.classifier(self.norm(features))
        logits = F.interpolate(logits, size=pixel_values.shape[2:], mode="bilinear", align_corners=False)
        return SemanticSegmenterOutput(logits=logits)
