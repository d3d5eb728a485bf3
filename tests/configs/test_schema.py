"""The schema has every upstream key with upstream's default, save the ones named here."""

from pathlib import Path

import yaml

from dinov2_custom.configs.archs import DEPTH_OF_ARCH, plain_arch_name
from dinov2_custom.configs.schema import all_options, default_values
from dinov2_custom.configs.values import coerce

UPSTREAM = yaml.safe_load((Path(__file__).parents[1] / "contracts" / "upstream_config_defaults.yaml").read_text())
DELIBERATE = {"train.dataset_path": "", "train.output_dir": ""} | {
    key: "auto" for key in UPSTREAM if key.endswith((".param_dtype", ".reduce_dtype", ".sharding_strategy"))
}
OURS = {
    "compute_precision.gather_dtype": "fp32",
    "train.path_preserved": "",
    "train.frac": 0.0,
    "train.channel_adaptive": False,  # of one of upstream's evaluation YAMLs, where nothing reads it
    "train.max_bad_fraction": 0.01,
    "student.freeze_backbone_epochs": 0,
    "dino.koleo_neighbours": "process",
    "train.max_nonfinite_steps": 3,
    "train.hang_timeout": 480,
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


def test_keys_and_defaults_are_upstreams_plus_ours():
    assert {key: option.default for key, option in all_options().items()} == UPSTREAM | DELIBERATE | OURS


def test_every_default_is_legal():
    for key, option in all_options().items():
        fitted = coerce(option, option.default)
        assert fitted == option.default and type(fitted) is type(option.default), key


def test_every_upstream_default_is_legal():
    for key, value in UPSTREAM.items():
        assert coerce(all_options()[key], value) == value, key


def test_every_key_is_described():
    assert [key for key, option in all_options().items() if not option.help] == []


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


def test_memeff_suffix_is_stripped():
    assert plain_arch_name("vit_small_memeff") == plain_arch_name("vit_small") == "vit_small"
