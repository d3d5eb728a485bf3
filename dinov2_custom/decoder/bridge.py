"""Build a detector or a segmenter of transformers around a pretrained backbone; write and read a trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from dinov2_custom.data.depth import Reading
from dinov2_custom.decoder.settings import Settings
from dinov2_custom.errors import CheckpointError, ConfigError
from dinov2_custom.export.portable import portable
from dinov2_custom.export.rf_detr_folder import (
    architecture,
    need_rf_detr,
    read_model,
    rf_detr_config,
    stages,
    with_backbone,
    write_preprocessor,
)
from dinov2_custom.files import parse_json_object
from dinov2_custom.reading import from_facts, to_facts
from dinov2_custom.teacher import Teacher

TASKS = ("detection", "instance", "semantic")
HEADS = {"detection": ("rf_detr",), "instance": ("rf_detr",), "semantic": ("upernet", "linear")}
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
        raise ConfigError(
            f"--task semantic: expected at least two classes, got {', '.join(classes) or 'none'}; add one to the "
            "labels, such as background"
        )
    model = portable(teacher, settings.image_size)
    head = choose_head(task, settings.head)
    decoder = with_backbone(
        lambda config: _MAKERS[head](task, config, classes, settings), model, settings.seed, random_backbone
    )
    facts = Facts(task, head, classes, model.image_size, teacher.normalize, teacher.reading or Reading())
    return Decoder(decoder.train(), facts)


def _labels(classes: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def _rf_detr(task: str, config: dict[str, Any], classes: tuple[str, ...], settings: Settings) -> nn.Module:
    from transformers import RfDetrForInstanceSegmentation, RfDetrForObjectDetection

    if settings.width % 16:
        raise ConfigError(f"width: expected a multiple of 16, got {settings.width}")
    weights = settings.loss
    full = rf_detr_config(
        config,
        num_queries=settings.queries,
        group_detr=settings.groups,
        decoder_layers=settings.decoder_layers,
        d_model=settings.width,
        dropout=settings.dropout,
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
    return kind(**architecture(config), out_features=stages(config["num_hidden_layers"], count))


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


def save(decoder: Decoder, folder: Path) -> None:
    """Write the model as transformers does, its preprocessing, and the facts into ``folder``."""
    facts = decoder.facts
    decoder.model.save_pretrained(folder)
    kind = "RfDetrImageProcessor" if facts.head == "rf_detr" else "SegformerImageProcessor"
    write_preprocessor(folder, kind, facts.image_size, facts.normalize, facts.reading)
    content = facts._asdict() | {"reading": to_facts(facts.reading)}
    (folder / FACTS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path) -> Decoder:
    """Return a trained decoder, from the folder ``best`` or ``last`` of a run, or from the run (its ``best``).

    Raises:
        CheckpointError: there is none, or a tensor is missing from the file.
        ConfigError: transformers is missing or too old.
    """
    transformers = need_rf_detr("a decoder")
    path = Path(folder).expanduser()
    path = path / "best" if (path / "best" / FACTS_FILE).is_file() else path
    try:
        facts = _read_facts(path / FACTS_FILE)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"expected a trained decoder, got no readable {FACTS_FILE} in {path} ({type(e).__name__}: {e}); give the "
            "--output-dir of run/decoder/train.py, or its folder best or last"
        ) from e
    if facts.head == "linear":
        from dinov2_custom.decoder.linear_head import LinearSegmenter as kind
    else:
        name = {"detection": "RfDetrForObjectDetection", "instance": "RfDetrForInstanceSegmentation"}
        kind = getattr(transformers, name.get(facts.task, "UperNetForSemanticSegmentation"))
    return Decoder(read_model(kind, path).eval(), facts)


def _read_facts(file: Path) -> Facts:
    """Read what :func:`save` wrote.

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: it cannot be read, or is something else.
    """
    found = parse_json_object(file.read_bytes())
    if found["head"] not in HEADS[found["task"]]:
        raise ValueError(f"a head {found['head']!r:.40} of the task {found['task']}")
    found["normalize"] = {name: tuple(map(float, found["normalize"][name])) for name in ("mean", "std")}
    found |= {"classes": tuple(map(str, found["classes"])), "image_size": int(found["image_size"])}
    return Facts(**found | {"reading": from_facts(found["reading"])})
