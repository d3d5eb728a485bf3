"""The eight released backbones, randomly initialised, with Meta's weights, or with those of a run of this project.

:func:`make_by_file` is for ``cell_dino`` and ``xray_dino``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_custom.errors import CheckpointError
from dinov2_custom.hub.utils import model_name, named, released_file
from dinov2_custom.models import vision_transformer
from dinov2_custom.models.vision_transformer import DinoVisionTransformer
from dinov2_custom.teacher import arguments_of, load_weights
from dinov2_custom.utils.paths import without_credentials
from dinov2_custom.utils.run_folder import find_weights, run_config_near
from dinov2_custom.utils.weights import check_sha256, flat_state, read_weights, to_local

_OF_THE_ARCHITECTURE = ("embed_dim", "depth", "num_heads", "mlp_ratio")  # determined by the name
_IN_NO_SHAPE = ("interpolate_antialias", "interpolate_offset", "channel_adaptive")


class Weights(Enum):
    """Released weights, named after their training data."""

    LVD142M = "LVD142M"
    XRAY_DINO = "XRay-DINO"  # no public address


def make_backbone(
    arch: str,
    *,
    registers: bool = False,
    pretrained: bool = True,
    weights: Weights | str | os.PathLike = Weights.LVD142M,
    check_hash: bool = False,
    **kwargs: Any,
) -> DinoVisionTransformer:
    """Build a backbone in training mode, as upstream's hub does.

    Args:
        arch: ``vit_small``, ``vit_base``, ``vit_large`` or ``vit_giant2``.
        pretrained: load ``weights``; if False, keep the random ones.
        weights: ``LVD142M``; or a path or URL of Meta's file or of a run's ``teacher_checkpoint.pth``, or a run
            directory (its newest teacher); patch size, image size, registers, FFN and LayerScale are then those of the
            file.
        check_hash: compare the file's SHA-256 with the prefix at the end of its name, as torch.hub does.
        kwargs: arguments of :class:`DinoVisionTransformer`; they take precedence.

    Raises:
        CheckpointError: unknown ``weights``, a failed download, or a file of another architecture.
    """
    factory = getattr(vision_transformer, arch)
    options = {
        "img_size": 518,
        "patch_size": 14,
        "init_values": 1.0,
        "ffn_layer": "swiglufused" if arch == "vit_giant2" else "mlp",
        "block_chunks": 0,
        "num_register_tokens": 4 if registers else 0,
        "interpolate_antialias": registers,
        "interpolate_offset": 0.0 if registers else 0.1,
    }
    if not pretrained:
        return factory(**(options | kwargs))
    if weights is Weights.LVD142M or str(weights) == Weights.LVD142M.value:
        file = released_file(arch, options["num_register_tokens"], "pretrain")
        state = _read(file, check_hash)
    else:
        file = _existing(weights)
        state = _read(file, check_hash)
        options |= _options_of(state, file)
    return _loaded(factory, options | kwargs, state, file, arch)


def make_by_file(
    name: str,
    arch: str,
    own: Mapping[str, Any],
    *,
    pretrained: bool,
    weights: Weights | str | os.PathLike | None,
    check_hash: bool = False,
    sha256: str = "",
    **kwargs: Any,
) -> DinoVisionTransformer:
    """Build a backbone whose weights Meta releases under a non-commercial licence, from the user's copy.

    Args:
        name: its name in ``hubconf.py``.
        own: arguments of :class:`DinoVisionTransformer`; ``img_size`` is only used without a file.
        weights: path or URL of the file.
        sha256: prefix of the file's digest for ``check_hash``, if known.
        kwargs: arguments of :class:`DinoVisionTransformer`; they take precedence.

    Raises:
        CheckpointError: missing ``weights``, a failed download, or a file of another architecture.
    """
    factory = getattr(vision_transformer, arch)
    options = {"init_values": 1.0, "block_chunks": 4, **own}
    if not pretrained:
        return factory(**(options | kwargs))
    if weights is None or isinstance(weights, Weights):
        raise CheckpointError(
            f"{name}: expected weights=, a path or URL of its file, got none; Meta gives it out under a non-commercial "
            "licence (upstream's README says where to ask), without a public address; pretrained=False: random weights"
        )
    file = _existing(weights)
    state = _read(file, check_hash, sha256)
    if "pos_embed" in state:
        options["img_size"] = math.isqrt(state["pos_embed"].shape[1] - 1) * options["patch_size"]
    return _loaded(factory, options | kwargs, state, file, name)


def _read(file: str | os.PathLike, check_hash: bool, sha256: str = "") -> dict[str, Tensor]:
    if check_hash:
        file = to_local(file)
        check_sha256(file, sha256)
    return flat_state(read_weights(file))


def _loaded(
    factory: Any, options: Mapping[str, Any], state: Mapping[str, Tensor], file: str | os.PathLike, name: str
) -> DinoVisionTransformer:
    with torch.device("meta"):  # no memory and no random numbers for tensors that are replaced at once
        model = factory(**options)
    advice = (
        "load it under the name of its own architecture, or a run or export of any architecture with "
        "dinov2_custom.load(PATH); delete the file where its download was cut"
    )
    load_weights(model, file, state, key="weights", what=name, advice=advice, assign=True)
    return model.to(torch.get_default_device())


def _make_dinov2_model(
    *,
    arch_name: str = "vit_large",
    num_register_tokens: int = 0,
    pretrained: bool = True,
    weights: Weights | str | os.PathLike = Weights.LVD142M,
    **kwargs: Any,
) -> DinoVisionTransformer:
    """Call :func:`make_backbone` under upstream's private name, which other projects import."""
    if num_register_tokens:
        kwargs["num_register_tokens"] = num_register_tokens
    return make_backbone(arch_name, registers=num_register_tokens > 0, pretrained=pretrained, weights=weights, **kwargs)


def _existing(weights: str | os.PathLike) -> str | os.PathLike:
    if isinstance(weights, Weights):
        raise CheckpointError(f"weights: expected LVD142M, a path or a URL, got {weights}, which has no public address")
    found = find_weights(weights)
    if "://" not in found and not Path(found).exists():
        raise CheckpointError(f"weights: expected LVD142M, a file or a run directory, got {weights}; check the path")
    return found


def _options_of(state: Mapping[str, Tensor], file: str | os.PathLike) -> dict[str, Any]:
    """Return the backbone's arguments, from the tensors of ``file`` and the config.yaml of its run."""
    from dinov2_custom.configs.load import read_config  # has dependencies other than torch

    try:
        options = arguments_of(state)
    except (KeyError, ValueError) as e:
        shown = without_credentials(file)
        raise CheckpointError(f"weights: expected a backbone's tensors, got a file without: {shown} ({e})") from e
    config = run_config_near(str(file))
    student = read_config(Path(config), "restore the file").get("student", {}) if config else {}
    found = {name: options[name] for name in options if name not in _OF_THE_ARCHITECTURE}
    return found | {name: student[name] for name in _IN_NO_SHAPE if name in student}


def _released(arch: str, registers: bool, doc: str) -> Callable[..., DinoVisionTransformer]:
    def build(*, pretrained: bool = True, weights: Weights | str = Weights.LVD142M, **kwargs):
        return make_backbone(arch, registers=registers, pretrained=pretrained, weights=weights, **kwargs)

    return named(build, model_name(arch) + "_reg" * registers, doc)


dinov2_vits14 = _released("vit_small", False, "Build ViT-S/14: width 384, 22 M parameters.")
dinov2_vitb14 = _released("vit_base", False, "Build ViT-B/14: width 768, 87 M parameters.")
dinov2_vitl14 = _released("vit_large", False, "Build ViT-L/14: width 1024, 304 M parameters.")
dinov2_vitg14 = _released("vit_giant2", False, "Build ViT-g/14: width 1536, SwiGLU, 1.1 G parameters.")
dinov2_vits14_reg = _released("vit_small", True, "Build ViT-S/14 with four registers.")
dinov2_vitb14_reg = _released("vit_base", True, "Build ViT-B/14 with four registers.")
dinov2_vitl14_reg = _released("vit_large", True, "Build ViT-L/14 with four registers.")
dinov2_vitg14_reg = _released("vit_giant2", True, "Build ViT-g/14 with four registers.")
