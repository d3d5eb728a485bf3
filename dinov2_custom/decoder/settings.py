"""The keys of a decoder's training: type, limits, default and meaning. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from dinov2_custom.configs.checks import Mistakes
from dinov2_custom.configs.load import nested, read_overrides, report_unknown, validated
from dinov2_custom.configs.schema import Fraction, Section, Wandb, all_keys, key


class LossWeights(Section):
    """Weights of the loss terms of detection and instance segmentation."""

    classes: NonNegativeFloat = key(1.0, "focal loss of the classes")
    box: NonNegativeFloat = key(5.0, "L1 distance of boxes")
    giou: NonNegativeFloat = key(2.0, "generalised intersection over union of boxes")
    mask: NonNegativeFloat = key(5.0, "cross-entropy of instance masks")
    dice: NonNegativeFloat = key(5.0, "dice loss of instance masks")


class Settings(Section):
    """All keys of `run/decoder/train.py`."""

    head: Literal["auto", "rf_detr", "upernet", "linear"] = key("auto", "auto: rf_detr for boxes, upernet for semantic")
    batch: PositiveInt = key(8, "images per process and step")
    accumulation: PositiveInt = key(1, "steps whose gradients are added before the weights change")
    epochs: PositiveInt = key(12, "passes over the training images; the learning rate falls to a tenth at 11/12")
    lr: PositiveFloat = key(2e-4, "learning rate of the decoder, and of the last block before `layer_decay`")
    layer_decay: Fraction = key(0.8, "factor of the learning rate from each block to the one before it")
    weight_decay: NonNegativeFloat = key(1e-4, "of AdamW; none on biases, norms, positions and queries")
    clip_grad: NonNegativeFloat = key(1.0, "largest norm of the gradient; 0: not clipped")
    warmup_steps: NonNegativeInt = key(0, "steps in which the learning rate rises linearly")
    frozen: bool = key(False, "train the decoder alone")
    precision: Literal["fp32", "bf16", "fp16"] = key("fp32", "of the forward pass (mixed precision); fp16 needs a GPU")
    seed: NonNegativeInt = key(0, "of the decoder's first weights, the order of images and the augmentation")
    image_size: NonNegativeInt = key(0, "side of the square that images are resized to; 0: that of pretraining")
    flip: Fraction = key(0.5, "probability of a horizontal flip")
    scale_jitter: Fraction = key(0.25, "random zoom in or out by at most this share; 0: none")
    label_smoothing: Fraction = key(0.0, "of the loss of the classes")
    queries: PositiveInt = key(300, "objects per image that RF-DETR can find, at most one for each patch")
    groups: PositiveInt = key(13, "copies of the queries during training (group DETR)")
    dropout: Fraction = key(0.1, "share of activations in RF-DETR's decoder that are zeroed in training")
    decoder_layers: PositiveInt = key(3, "layers of RF-DETR's decoder")
    width: PositiveInt = key(256, "channels of the decoder, a multiple of 16")
    num_workers: NonNegativeInt = key(2, "data-loading processes per process", changes_results=False)
    loss: LossWeights = Field(default_factory=LossWeights)
    wandb: Wandb = Field(default_factory=Wandb)


def read_settings(overrides: Sequence[str]) -> Settings:
    """Return the settings from ``key=value`` strings, such as ``lr=1e-4`` and ``loss.giou=1``.

    Raises:
        ConfigError: lists all unknown keys and invalid values.
    """
    mistakes, known = Mistakes("the decoder's settings"), all_keys(Settings)
    settings = read_overrides(overrides, mistakes, Settings)
    given = {setting.key: setting for setting in settings if setting.key in known}
    report_unknown([one for one in settings if one.key not in known], mistakes, Settings, "see docs/decoder.md")
    values = validated({name: setting.value for name, setting in given.items()}, given, mistakes, Settings)
    mistakes.raise_if_any()
    return Settings.model_validate(nested(values))
