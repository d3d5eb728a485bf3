"""The schema has every upstream key with upstream's default, except those named here."""

from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from dinov2_custom.configs.schema import DEPTH_OF_ARCH, Config, all_keys, default_values, kinds, section_keys

UPSTREAM = yaml.safe_load((Path(__file__).parents[1] / "contracts" / "upstream_config_defaults.yaml").read_text())
DELIBERATE = {"train.dataset_path": "", "train.output_dir": ""} | {
    key: "auto" for key in UPSTREAM if key.endswith((".param_dtype", ".reduce_dtype", ".sharding_strategy"))
}
OURS = {
    "compute_precision.gather_dtype": "fp32",
    "train.path_preserved": "",
    "train.frac": 0.0,
    **{f"evaluation.online.{key}": "" for key in ("knn_train", "knn_val")},
    "evaluation.online.every": 0,
    "evaluation.online.images": 256,
    "evaluation.online.compare_to_start": True,
    "evaluation.online.best": "auto",
    "train.channel_adaptive": False,  # of one of upstream's evaluation YAMLs, where nothing reads it
    "train.max_bad_fraction": 0.01,
    "student.freeze_backbone_epochs": 0,
    "dino.koleo_neighbours": "process",
    "train.max_nonfinite_steps": 3,
    "train.hang_timeout": 480,
    "train.on_collapse": "warn",
    "train.max_steps": 0,
    "train.max_hours": 0,
    "train.log_every": 10,
    "train.tensorboard": False,
    "train.view_groups": "auto",
    "train.lean": True,
    "train.compile": "auto",
    "train.activation_checkpointing": "auto",
    "wandb.mode": "disabled",
    **{f"wandb.{key}": "" for key in ("project", "entity", "name", "group", "tags", "id")},
    "mlflow.enabled": False,
    **{f"mlflow.{key}": "" for key in ("tracking_uri", "experiment", "name", "id")},
    "checkpointing.period": 0,
    "checkpointing.keep_last": 3,
    "checkpointing.keep_every": 0,
    "optim.accumulation_steps": 1,
    "optim.global_batch": 0,
    "checkpointing.on_error": "warn",
    "checkpointing.async_save": False,
    "data.normalize.mean": [0.485, 0.456, 0.406],
    "data.normalize.std": [0.229, 0.224, 0.225],
    "data.dct_scaling": False,
    "data.intensity": "auto",
    "data.page": 0,
    "augmentation.brightness": 0.4,
    "augmentation.contrast": 0.4,
    "augmentation.saturation": 0.2,
    "augmentation.hue": 0.1,
    "augmentation.jitter_p": 0.8,
    "augmentation.gray_p": 0.2,
    "augmentation.solarize_p": 0.2,
    "augmentation.blur_p": [0.0, 0.9, 0.5],
    "augmentation.blur_sigma": [0.1, 2.0],
    "augmentation.hflip_p": 0.5,
    "augmentation.device": "auto",
}


def fit(key, value):
    """Return the value of ``key`` in a configuration in which it is set to ``value``."""
    tree = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    return attrgetter(key)(Config.model_validate(tree))


def test_keys_and_defaults_are_upstreams_plus_ours():
    assert {key: field.default for key, field in all_keys().items()} == UPSTREAM | DELIBERATE | OURS


def test_every_default_is_legal():
    for key, field in all_keys().items():
        fitted = fit(key, field.default)
        assert fitted == field.default and type(fitted) is type(field.default), key


def test_every_upstream_default_is_legal():
    for key, value in UPSTREAM.items():
        assert fit(key, value) == value, key


@pytest.mark.parametrize(
    ("key", "value", "result"),
    [
        ("optim.base_lr", 1, 1.0),
        ("optim.clip_grad", None, None),
        ("optim.clip_grad", 0, 0.0),
        ("student.layerscale", None, None),
        ("optim.epochs", 0.5, 0.5),
        ("optim.epochs", 100.0, 100),
        ("student.block_chunks", 4.0, 4),
        ("student.pretrained_weights", None, ""),
        ("train.OFFICIAL_EPOCH_LENGTH", "auto", "auto"),
        ("train.OFFICIAL_EPOCH_LENGTH", 7, 7),
        ("train.dataset_path", ["/a", "/b"], ["/a", "/b"]),
        ("train.dataset_path", {"path": "/a"}, {"path": "/a"}),
        ("train.dataset_path", [{"path": "/a", "weight": 0.7}, "/b"], [{"path": "/a", "weight": 0.7}, "/b"]),
        ("crops.local_crops_scale", [1, 1], [1.0, 1.0]),
        ("evaluation.eval_period_iterations", -1, -1),
        ("student.qkv_bias", False, False),
        ("train.compile", True, "on"),
        ("train.compile", False, "off"),
        ("optim.warmup_epochs", 3, 3),
        ("optim.warmup_epochs", 0.5, 0.5),
        ("optim.warmup_epochs", "12.5%", "12.5%"),
    ],
)
def test_legal_values_take_the_type_of_the_key(key, value, result):
    fitted = fit(key, value)
    assert fitted == result and type(fitted) is type(result)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.base_lr", "1e-3"),
        ("optim.base_lr", True),
        ("optim.base_lr", -1e-3),
        ("optim.base_lr", float("nan")),
        ("optim.base_lr", None),
        ("optim.epochs", float("inf")),
        ("optim.epochs", 0),
        ("optim.warmup_epochs", "101%"),
        ("optim.warmup_epochs", "-1%"),
        ("optim.warmup_epochs", "ten"),
        ("optim.warmup_epochs", None),
        ("optim.epochs", "10%"),
        ("train.max_steps", -1),
        ("student.drop_path_rate", 1.0),
        ("student.patch_size", 14.5),
        ("student.patch_size", [14, 14]),
        ("train.batch_size_per_gpu", 0),
        ("student.qkv_bias", 1),
        ("student.arch", 5),
        ("train.centering", "sinkhorn"),
        ("train.OFFICIAL_EPOCH_LENGTH", "dataset"),
        ("ibot.mask_ratio_min_max", [0.5, 0.1]),
        ("ibot.mask_ratio_min_max", [0.1, 0.5, 0.6]),
        ("ibot.mask_ratio_min_max", 0.5),
        ("crops.global_crops_scale", [0.0, 1.0]),
        ("augmentation.blur_p", [0.1, 0.2]),
        ("train.path_preserved", []),
        ("train.path_preserved", ["/a", 3]),
        ("train.dataset_path", []),
        ("train.dataset_path", ["/a", 3]),
        ("train.dataset_path", {}),
        ("optim.clip_grad", "none"),
        ("train.compile", 1),
        ("train.compile", []),
    ],
)
def test_illegal_values(key, value):
    with pytest.raises(ValidationError):
        fit(key, value)


def test_an_unknown_key_is_illegal():
    with pytest.raises(ValidationError, match="sed"):
        Config.model_validate({"train": {"sed": 1}})


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("student.arch", {"string"}),
        ("train.dataset_path", {"string", "object", "array"}),
        ("train.centering", set()),
        ("train.num_workers", {"integer"}),
        ("optim.warmup_epochs", {"number"}),
    ],
)
def test_kinds_have_string_only_for_any_text(key, kind):
    assert kinds(key) == kind


def test_section_keys():
    assert section_keys()["crops"][-1] == "local_crops_size"
    assert section_keys()["compute_precision.teacher"] == ["backbone", "dino_head", "ibot_head"]


def test_every_key_is_described():
    assert [key for key, field in all_keys().items() if not field.description] == []


def test_defaults_are_fresh_objects():
    first = default_values()
    first["crops"]["global_crops_scale"][0] = 7
    assert default_values()["crops"]["global_crops_scale"] == [0.32, 1.0]


def test_archs_are_the_models_of_vision_transformer():
    from dinov2_custom.models import vision_transformer

    names = {name for name in vars(vision_transformer) if name.startswith("vit_")}
    assert names == set(DEPTH_OF_ARCH)
    for name in ("vit_nano", "vit_micro", "vit_tiny"):
        assert getattr(vision_transformer, name)(img_size=32).n_blocks == DEPTH_OF_ARCH[name]


def test_depths_of_upstreams_archs():
    assert [DEPTH_OF_ARCH[f"vit_{name}"] for name in ("small", "base", "large", "giant2")] == [12, 12, 24, 40]
