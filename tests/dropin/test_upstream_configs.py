"""The YAML files of upstream at 7764ea0, as shipped and as written into a run, build here.

Those for cell images, which this package does not ship, are reproduced from their keys and values.
"""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from dinov2_custom.configs import dinov2_default_config
from dinov2_custom.configs.load import PACKAGE_DIR, load_config, load_run_config
from dinov2_custom.errors import ConfigError
from dinov2_custom.models import build_model_from_cfg
from tests.configs.test_schema import UPSTREAM

CELLS = {
    "train": {"batch_size_per_gpu": 16, "OFFICIAL_EPOCH_LENGTH": 450, "cell_augmentation": True},
    "student": {"arch": "vit_large", "patch_size": 16, "drop_path_rate": 0.1, "block_chunks": 4},
    "teacher": {"momentum_teacher": 0.996, "warmup_teacher_temp_epochs": 20},
    "optim": {"weight_decay_end": 0.2, "base_lr": 5e-4, "warmup_epochs": 20},
    "crops": {
        "global_crops_scale": [0.4, 1],
        "local_crops_scale": [0.005, 0.4],
        "local_crops_number": 8,
        "local_crops_size": 96,
    },
    "evaluation": {"eval_period_iterations": 9000},
}
HPA = "split=ALL:root=/hpa:mode=PROTEIN_LOCALIZATION"
FOUR = {"student": {"in_chans": 4}, "teacher": {"in_chans": 4}}
BAG = {section: {"in_chans": 1, "channel_adaptive": True} for section in ("student", "teacher")}
LARGE = {"student": {"arch": "vit_large", "patch_size": 16, "block_chunks": 4}}
TRAIN = {
    "vitl16_hpaone": [CELLS, FOUR, {"train": {"dataset_path": f"HPAone:{HPA}"}}],
    "vitl16_hpafov": [CELLS, FOUR, {"train": {"dataset_path": f"HPAFoV:{HPA}"}}],
    "vitl16_boc_hpafov": [CELLS, BAG, {"train": {"dataset_path": f"HPAFoV:{HPA}:wildcard=SEPARATE_CHANNELS"}}],
    "only_the_student": [CELLS, {"student": FOUR["student"]}, {"train": {"dataset_path": f"HPAone:{HPA}"}}],
}
EVAL = {
    "vitl16_pretrain": [LARGE, FOUR],
    "vitl16_channel_adaptive_pretrain": [LARGE, BAG, {"train": {"channel_adaptive": True}}],
}
SHIPPED = [path.relative_to(PACKAGE_DIR).with_suffix("").as_posix() for path in PACKAGE_DIR.glob("*/*.yaml")]
FILES = {name: OmegaConf.merge(*parts) for name, parts in (TRAIN | EVAL).items()}
FILES |= {name: load_config(name) for name in SHIPPED}


def upstreams_defaults():
    """Upstream's ssl_default_config.yaml."""
    cfg = OmegaConf.create()
    for key, value in UPSTREAM.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


@pytest.fixture(params=["as it is", "as a run writes it"])
def written(request, tmp_path):
    """Return a function that writes the YAML of a name, alone or over all of upstream's defaults."""

    def write(name):
        cfg = FILES[name] if request.param == "as it is" else OmegaConf.merge(upstreams_defaults(), FILES[name])
        OmegaConf.save(cfg, tmp_path / "config.yaml")
        return str(tmp_path / "config.yaml")

    return write


@pytest.mark.parametrize("name", FILES)
def test_it_loads_and_builds(written, name, tmp_path):
    path = written(name)
    checked = load_run_config(path, ["train.output_dir="], str(tmp_path), require_dataset=False, training=False)
    merged = OmegaConf.merge(dinov2_default_config, OmegaConf.load(path))
    for cfg in (checked, merged):
        wanted = FILES[name].student
        with torch.device("meta"):
            student, teacher, width = build_model_from_cfg(cfg)
            alone, _ = build_model_from_cfg(cfg, only_teacher=True)
        assert width == student.embed_dim
        for model in (student, teacher, alone):
            assert model.patch_embed.proj.in_channels == wanted.get("in_chans", 3)
            assert model.bag_of_channels == wanted.get("channel_adaptive", False)
            assert model.chunked_blocks == bool(wanted.get("block_chunks", 0))


@pytest.mark.parametrize("name", TRAIN)
def test_what_cannot_be_trained_is_refused_at_once(written, name):
    path = written(name)
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    lines = str(caught.value).splitlines()[1:]
    keys = ["student.in_chans", "student.channel_adaptive", "train.cell_augmentation"]
    if not FILES[name].student.get("channel_adaptive"):
        keys.remove("student.channel_adaptive")
    assert [line.split()[1] for line in lines] == keys
    assert all(f"({path})" in line for line in lines) and "augmentation.hue" in lines[-1]


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("train/")])
def test_the_others_can_be_trained(written, name):
    cfg = load_run_config(written(name), ["train.dataset_path=/images"], warn=pytest.fail)
    assert (cfg.student.in_chans, cfg.train.cell_augmentation) == (3, False)


def test_a_teacher_of_its_own_is_refused():
    with pytest.raises(ConfigError, match="teacher.in_chans .*: expected the student's, 3, got 4") as caught:
        load_run_config("", ["teacher.in_chans=4", "teacher.channel_adaptive=true"], training=False)
    assert "teacher.channel_adaptive (override)" in str(caught.value)
