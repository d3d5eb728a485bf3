"""Put a backbone into models of transformers that contain one, prove that it was loaded, and write an RF-DETR folder.

``RfDetrForObjectDetection.from_pretrained(<folder of a backbone>)`` leaves every tensor of the backbone random and only
logs it. Here its tensors are copied and compared bit for bit, and so are the features.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_custom.errors import CheckpointError, ConfigError, missing, optional
from dinov2_custom.export.compare import unlike_tensors, wanted_tensors
from dinov2_custom.export.hugging_face import write_hugging_face
from dinov2_custom.export.portable import Portable
from dinov2_custom.files import utf8_path
from dinov2_custom.reading import Reading, to_facts
from dinov2_custom.utils.hugging_face import from_hugging_face
from dinov2_custom.utils.rng import seed_for

TOLERANCE = 1e-5
MAX_QUERIES = 300


def need_rf_detr(purpose: str) -> Any:
    """Return the module transformers.

    Raises:
        ConfigError: it is missing, or too old to have RF-DETR.
    """
    transformers = optional("transformers", purpose)
    if not hasattr(transformers, "RfDetrForObjectDetection"):
        raise ConfigError(missing("transformers", purpose, got="got a version before 5.24"))
    return transformers


def write_rf_detr(model: Portable, folder: Path) -> str:
    """Write an RF-DETR with new decoder and heads into ``folder``, load it again; return a line on the comparison."""
    kind = need_rf_detr("--to rf-detr").RfDetrForObjectDetection
    detector = with_backbone(lambda config: kind(rf_detr_config(config)), model, seed=0)
    detector.save_pretrained(folder)
    write_preprocessor(folder, "RfDetrImageProcessor", model.image_size, model.normalize, model.reading)
    difference = prove(read_model(kind, folder), model)
    return (
        f"features in transformers differ by at most {difference:.1e} with LayerScale 1, tensors are the same; the "
        "decoder and its heads are new: train them"
    )


def with_backbone(
    make: Callable[[dict[str, Any]], nn.Module], model: Portable, seed: int, random_backbone: bool = False
) -> nn.Module:
    """Return ``make(config)`` of the backbone's config.json with its tensors, or, for comparison, with random ones.

    Raises:
        ConfigError: ``make`` refuses, or the model has no feed-forward network.
        CheckpointError: a tensor is missing or different, or features differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_hugging_face(model, Path(folder))
        config = json.loads((Path(folder) / "config.json").read_text())
        with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator, on the CPU
            torch.manual_seed(seed_for(seed, "decoder"))
            made = make(config)
        if not random_backbone:
            import transformers

            registers = "num_register_tokens" in config
            kind = transformers.Dinov2WithRegistersBackbone if registers else transformers.Dinov2Backbone
            backbone_of(made).load_state_dict(kind.from_pretrained(folder).state_dict(), strict=False)
            prove(made, model)
    return made


def rf_detr_config(config: dict[str, Any], **options: Any) -> Any:
    """Return an RfDetrConfig whose backbone has the config.json ``config`` and attends to the whole image.

    ``options`` are fields of RfDetrConfig; ``num_queries`` is reduced to the number of patches.

    Raises:
        ConfigError: RF-DETR cannot hold the architecture.
    """
    from transformers import RfDetrConfig, RfDetrDinov2Config

    if number := config.get("num_register_tokens"):
        raise ConfigError(
            f"RF-DETR: expected a backbone without register tokens, got {number}; train a segmenter (--task semantic), "
            "or pretrain with student.num_register_tokens=0"
        )
    if config["mlp_ratio"] != int(config["mlp_ratio"]):
        raise ConfigError(f"RF-DETR: expected a whole ratio of the feed-forward network, got {config['mlp_ratio']:g}")
    backbone = RfDetrDinov2Config(
        **architecture(config), num_windows=1, out_features=stages(config["num_hidden_layers"])
    )
    num_patches = (config["image_size"] // config["patch_size"]) ** 2
    options["num_queries"] = min(options.get("num_queries", MAX_QUERIES), num_patches)
    return RfDetrConfig(backbone_config=backbone, **options)


def stages(depth: int, count: int = 4) -> list[str]:
    """Return the names of ``count`` blocks at equal distances, up to the last one."""
    return [f"stage{index}" for index in dict.fromkeys(-(-depth * (k + 1) // count) for k in range(count))]


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a configuration class from a config.json."""
    return {name: value for name, value in config.items() if name not in ("architectures", "model_type")}


def backbone_of(decoder: nn.Module) -> nn.Module:
    """Return the module of ``decoder`` that has the backbone's embeddings and encoder."""
    return next(part for part in decoder.modules() if hasattr(part, "embeddings") and hasattr(part, "encoder"))


@torch.no_grad()
def prove(decoder: nn.Module, model: Portable) -> float:
    """Return the largest difference of features, relative to the largest feature, with LayerScale 1 on both sides.

    Raises:
        CheckpointError: a tensor of the backbone is missing, left over or different, or features differ by more than
            ``TOLERANCE``.
    """
    backbone = backbone_of(decoder)
    wanted = wanted_tensors(model, "hf")
    if unlike := unlike_tensors(from_hugging_face(backbone.state_dict()), wanted):
        raise CheckpointError(
            f"expected the decoder to have the backbone's {len(wanted)} tensors, got {len(unlike)} others:\n  "
            + "\n  ".join(unlike[:5])
        )
    images = 4 * torch.rand(2, model.in_chans, *2 * [model.image_size], generator=torch.Generator().manual_seed(0)) - 2
    own = _ones(copy.deepcopy(model.backbone).cpu().float().eval(), "gamma").forward_features(images)
    got = _ones(copy.deepcopy(backbone).eval(), "lambda1")(images).feature_maps[-1].flatten(2).transpose(1, 2)
    patches: Tensor = own["x_norm_patchtokens"]
    difference = float((got - patches).abs().max() / patches.abs().max().clamp_min(1))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"expected the decoder's backbone to give the same features, got a difference of {difference:.1e} "
            f"(allowed {TOLERANCE:.0e})"
        )
    return difference


def _ones(module: nn.Module, name: str) -> nn.Module:
    for key, value in module.named_parameters():
        if key.endswith(f".{name}"):
            value.fill_(1)
    return module


def write_preprocessor(
    folder: Path, kind: str, image_size: int, normalize: dict[str, tuple[float, ...]], reading: Reading
) -> None:
    """Write preprocessor_config.json: the whole image, resized to a square and normalised as in pretraining."""
    content = {
        "image_processor_type": kind,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": image_size, "width": image_size},
        "image_mean": list(normalize["mean"]),
        "image_std": list(normalize["std"]),
        **to_facts(reading),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_model(kind: Any, folder: str | Path) -> nn.Module:
    """Return ``kind.from_pretrained(folder)``, which by itself only logs that tensors are missing.

    Raises:
        CheckpointError: a tensor is missing, or transformers cannot read the folder.
    """
    try:
        with utf8_path(folder) as plain:
            model, found = kind.from_pretrained(plain, output_loading_info=True, use_safetensors=True)
    except Exception as e:  # each library raises its own errors
        reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        raise CheckpointError(f"expected a {kind.__name__} that transformers reads in {folder}, got {reason}") from e
    if wrong := [*found["missing_keys"], *found["mismatched_keys"], *found["unexpected_keys"]]:
        names = ", ".join(map(str, wrong))
        raise CheckpointError(f"expected the tensors of a {kind.__name__} in {folder}, got none or others for {names}")
    return model
