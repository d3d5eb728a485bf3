"""Build a detector or a segmenter of transformers around a pretrained backbone, and prove that it has its weights.

``RfDetrForObjectDetection.from_pretrained(<a backbone>)`` leaves every tensor of the backbone random and only logs it.
Here the backbone's tensors are copied, all of them are compared bit for bit, and the features of both are compared.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_custom.data.depth import Reading
from dinov2_custom.decoder.settings import Settings
from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.export.compare import unlike_tensors, wanted_tensors
from dinov2_custom.export.hugging_face import write_hugging_face
from dinov2_custom.export.portable import Portable, portable
from dinov2_custom.reading import from_facts, to_facts
from dinov2_custom.teacher import Teacher
from dinov2_custom.utils.hugging_face import from_hugging_face
from dinov2_custom.utils.rng import seed_for

TASKS = ("detection", "instance", "semantic")
HEADS = {"detection": ("rf_detr",), "instance": ("rf_detr",), "semantic": ("upernet", "linear")}
TOLERANCE = 1e-5
FACTS_FILE = "decoder.json"  # in the folder of a trained decoder


class Facts(NamedTuple):
    """What a trained decoder needs besides its weights.

    Attributes:
        image_size: side of the square that images are resized to.
        normalize: ``mean`` and ``std`` of pretraining.
        reading: of images of more than 8 bits or several pages, as in pretraining.
    """

    task: str
    head: str
    classes: tuple[str, ...]
    image_size: int
    normalize: dict[str, tuple[float, ...]]
    reading: Reading


class Decoder(NamedTuple):
    """A model of transformers and its facts."""

    model: Any
    facts: Facts


def choose_head(task: str, head: str) -> str:
    """Return the head of ``task``.

    Raises:
        ConfigError: the head is one of another task.
    """
    if head != "auto" and head not in HEADS[task]:
        raise ConfigError(f"head: expected {' or '.join(HEADS[task])} for --task {task}, got {head}")
    return HEADS[task][0] if head == "auto" else head


def build(
    teacher: Teacher, task: str, classes: tuple[str, ...], settings: Settings, random_backbone: bool = False
) -> Decoder:
    """Return the decoder of ``task`` with the tensors of ``teacher``, or, for comparison, with random ones.

    Raises:
        ConfigError: the decoder cannot hold the architecture or the size.
        CheckpointError: a tensor of the backbone is missing or different in the decoder, or its features differ.
    """
    if task == "semantic" and len(classes) < 2:
        raise ConfigError(f"--task semantic: expected at least two classes, got {', '.join(classes) or 'none'}")
    model = portable(teacher, settings.image_size)
    head = choose_head(task, settings.head)
    if head == "rf_detr" and teacher.backbone.num_register_tokens:
        raise ConfigError(
            f"--task {task}: RF-DETR of transformers has no register tokens, got a backbone with "
            f"{teacher.backbone.num_register_tokens}; use --task semantic, or student.num_register_tokens=0 in "
            "pretraining"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_hugging_face(model, Path(folder))
        config = json.loads((Path(folder) / "config.json").read_text())
        with torch.random.fork_rng():  # transformers initialises from the global generator
            torch.manual_seed(seed_for(settings.seed, "decoder"))
            decoder = _MAKERS[head](task, config, classes, settings)
        if not random_backbone:
            backbone_of(decoder).load_state_dict(_plain_backbone(Path(folder), config).state_dict(), strict=False)
            prove(decoder, model)
    facts = Facts(task, head, classes, model.image_size, teacher.normalize, teacher.reading or Reading())
    return Decoder(decoder.train(), facts)


def _plain_backbone(folder: Path, config: dict[str, Any]) -> nn.Module:
    from transformers import Dinov2Backbone, Dinov2WithRegistersBackbone

    kind = Dinov2WithRegistersBackbone if "num_register_tokens" in config else Dinov2Backbone
    return kind.from_pretrained(folder)


def _stages(depth: int, count: int = 4) -> list[str]:
    """Return the names of ``count`` blocks at equal distances, up to the last one."""
    return [f"stage{index}" for index in dict.fromkeys(-(-depth * (k + 1) // count) for k in range(count))]


def _labels(classes: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("architectures", "model_type")}


def _rf_detr(task: str, config: dict[str, Any], classes: tuple[str, ...], settings: Settings) -> nn.Module:
    from transformers import RfDetrConfig, RfDetrDinov2Config, RfDetrForInstanceSegmentation, RfDetrForObjectDetection

    if config["mlp_ratio"] != int(config["mlp_ratio"]):
        raise ConfigError(f"RF-DETR: expected a whole ratio of the feed-forward network, got {config['mlp_ratio']:g}")
    if settings.width % 16:
        raise ConfigError(f"width: expected a multiple of 16, got {settings.width}")
    backbone = RfDetrDinov2Config(
        **_architecture(config), num_windows=1, out_features=_stages(config["num_hidden_layers"])
    )
    num_patches = (config["image_size"] // config["patch_size"]) ** 2
    weights = settings.loss
    full = RfDetrConfig(
        backbone_config=backbone,
        num_queries=min(settings.queries, num_patches),
        group_detr=settings.groups,
        decoder_layers=settings.decoder_layers,
        d_model=settings.width,
        class_loss_coefficient=weights.classes,
        bbox_loss_coefficient=weights.box,
        giou_loss_coefficient=weights.giou,
        mask_class_loss_coefficient=weights.mask,
        mask_dice_loss_coefficient=weights.dice,
        **_labels(classes),
    )
    return (RfDetrForInstanceSegmentation if task == "instance" else RfDetrForObjectDetection)(full)


def _backbone_config(config: dict[str, Any], count: int) -> Any:
    from transformers import Dinov2Config, Dinov2WithRegistersConfig

    kind = Dinov2WithRegistersConfig if "num_register_tokens" in config else Dinov2Config
    return kind(**_architecture(config), out_features=_stages(config["num_hidden_layers"], count))


def _upernet(task: str, config: dict[str, Any], classes: tuple[str, ...], settings: Settings) -> nn.Module:
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=_backbone_config(config, 4),
            hidden_size=settings.width,
            use_auxiliary_head=False,
            **_labels(classes),
        )
    )


def _linear(task: str, config: dict[str, Any], classes: tuple[str, ...], settings: Settings) -> nn.Module:
    from dinov2_custom.decoder.linear_head import LinearSegmenter, LinearSegmenterConfig

    return LinearSegmenter(LinearSegmenterConfig(backbone_config=_backbone_config(config, 1), **_labels(classes)))


_MAKERS = {"rf_detr": _rf_detr, "upernet": _upernet, "linear": _linear}


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


def save(decoder: Decoder, folder: Path) -> None:
    """Write the model as transformers does, its preprocessing, and the facts into ``folder``."""
    facts = decoder.facts
    decoder.model.save_pretrained(folder)
    side = {"height": facts.image_size, "width": facts.image_size}
    common = {"size": side, "image_mean": list(facts.normalize["mean"]), "image_std": list(facts.normalize["std"])}
    kind = "RfDetrImageProcessor" if facts.head == "rf_detr" else "SegformerImageProcessor"
    content = {"image_processor_type": kind, "do_resize": True, "do_rescale": True, "do_normalize": True, **common}
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    content = facts._asdict() | {"reading": to_facts(facts.reading)}
    (folder / FACTS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path) -> Decoder:
    """Return a trained decoder, from the folder ``best`` or ``last`` of a run, or from the run (its ``best``).

    Raises:
        CheckpointError: there is none, or a tensor is missing from the file.
    """
    import transformers

    path = Path(folder).expanduser()
    path = path / "best" if (path / "best" / FACTS_FILE).is_file() else path
    try:
        facts = json.loads((path / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(
            f"expected a trained decoder, got no readable {FACTS_FILE} in {path}; give the --output-dir of "
            "run/decoder/train.py, or its folder best or last"
        ) from e
    if facts["head"] == "linear":
        from dinov2_custom.decoder.linear_head import LinearSegmenter as kind
    else:
        name = {"detection": "RfDetrForObjectDetection", "instance": "RfDetrForInstanceSegmentation"}
        kind = getattr(transformers, name.get(facts["task"], "UperNetForSemanticSegmentation"))
    model = read_model(kind, path)
    normalize = {name: tuple(values) for name, values in facts["normalize"].items()}
    facts |= {"classes": tuple(facts["classes"]), "normalize": normalize, "reading": from_facts(facts["reading"])}
    return Decoder(model.eval(), Facts(**facts))


def read_model(kind: Any, folder: str | Path) -> nn.Module:
    """Return ``kind.from_pretrained(folder)``, which by itself only logs that tensors are missing.

    Raises:
        CheckpointError: a tensor is missing.
    """
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    if missing := [*found["missing_keys"], *found["mismatched_keys"], *found["unexpected_keys"]]:
        names = ", ".join(map(str, missing))
        raise CheckpointError(f"expected the tensors of a {kind.__name__} in {folder}, got none or others for {names}")
    return model
