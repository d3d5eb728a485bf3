"""The backbones and how a configuration builds them."""

from dinov2_custom.models.build import build_heads, build_model, build_model_from_cfg
