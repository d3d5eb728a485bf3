"""The recipes in configs/ at the root load, are consistent and have the required information in their headers."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.logging import remove_logging
from dinov2_custom.models import build_model_from_cfg
from dinov2_custom.teacher import load_teacher
from dinov2_custom.train import get_args_parser, main
from dinov2_custom.train.flops import flops_per_image
from dinov2_custom.train.gpus import GPUS
from dinov2_custom.train.memory import measure_step
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.data.textures import make_textures

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
OURS = ["dino_classic", "vitb", "vitg", "vitl", "vits"]


CONTINUED = ["continue_vitb14", "continue_vitg14", "continue_vitl14", "continue_vits14"]


def load(name, *overrides):
    path = next(path for path in RECIPES if path.stem == name)
    return load_run_config(str(path), ["train.dataset_path=/images", *overrides], warn=pytest.fail)


def test_all_recipes_are_there():
    assert {*OURS, *CONTINUED, "small"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_without_a_warning(path):
    load_run_config(str(path), require_dataset=False, warn=pytest.fail)


@pytest.mark.parametrize("name", [*OURS, *CONTINUED])
def test_header_has_command_hardware_hours_memory_and_score(name):
    header = next(path for path in RECIPES if path.stem == name).read_text().split("\nstudent:")[0]
    assert f"python run/train/train.py --config-file configs/{name}.yaml --output-dir out " in header
    for label in ("# Hardware ", "# Hours ", "# Memory ", "# Score     unknown until measured", "Estimated"):
        assert label in header
    assert all(line.startswith("#") for line in header.splitlines())


@pytest.mark.parametrize("name", [*OURS, *CONTINUED])
def test_work_and_hours_in_the_header_are_the_formulas(name):
    cfg = load(name)
    with torch.device("meta"):
        backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    flops = flops_per_image(cfg, backbone.embed_dim, backbone.n_blocks)
    words = " ".join(next(path for path in RECIPES if path.stem == name).read_text().replace("#", " ").split())
    assert f"Estimated: {flops / 1e9:.0f} GFLOP per image, 40 % of the A100's bf16 peak" in words
    said = r"Hours ([\d.]+) on one A100(.*?) for 100,000 images \((\d+) passes\)"
    given, others, passes = re.search(said, words).groups()
    assert int(passes) == cfg.optim.epochs
    hours = 100_000 * cfg.optim.epochs * flops / (0.4 * GPUS["A100-80GB"].flops) / 3600
    assert float(given) == pytest.approx(hours, rel=0.03)
    for number, gpus in re.findall(r", ([\d.]+) on (two|eight)", others):
        assert float(number) == pytest.approx(hours / {"two": 2, "eight": 8}[gpus], rel=0.03)


@pytest.mark.parametrize("name", ["vits", "vitb", "vitl", "dino_classic"])
def test_memory_in_the_header_is_the_count(name):
    cfg = load(name)
    header = next(path for path in RECIPES if path.stem == name).read_text()
    said = re.search(r"# Memory +([\d.]+) GB per GPU at batch (\d+)", header)
    assert int(said.group(2)) == cfg.train.batch_size_per_gpu
    assert float(said.group(1)) == pytest.approx(measure_step(SSLMetaArch, cfg).peak / 1e9, abs=0.06)


def test_memory_in_the_docs_is_that_of_the_headers():
    root = RECIPES[0].parents[1]
    docs, scaling = ((root / "docs" / name).read_text() for name in ("memory.md", "scaling.md"))
    rows = re.findall(r"\| `configs/(\w+)\.yaml`, (\d+) \| ([\d.]+) \|", docs)
    assert {name for name, _, _ in rows} == {"vits", "vitb", "vitl", "vitg"}
    for name, batch, size in rows:
        text = (RECIPES[0].parent / f"{name}.yaml").read_text()
        header = re.search(r"# Memory +([\d.]+) GB per GPU at batch (\d+)", text)
        if batch == header[2]:
            assert size == header[1]
        else:
            assert float(size) == pytest.approx(
                measure_step(SSLMetaArch, load(name, f"train.batch_size_per_gpu={batch}")).peak / 1e9, abs=0.06
            )
    of_vitl = {batch: size for name, batch, size in rows if name == "vitl"}
    assert re.search(r"ViT-L needs ([\d.]+) GB at batch 64", scaling).group(1) == of_vitl["64"]


@pytest.mark.parametrize("name", OURS)
def test_recipe_is_for_ones_own_images(name):
    cfg = load(name)
    assert cfg.train.OFFICIAL_EPOCH_LENGTH == "auto"
    assert (cfg.optim.epochs, cfg.optim.warmup_epochs) == (100, 10)
    assert 2e-4 <= cfg.optim.base_lr <= 1e-3
    assert cfg.optim.lr > cfg.optim.min_lr
    assert cfg.compute_precision.student.backbone.mixed_precision.param_dtype == "auto"


@pytest.mark.parametrize(
    ("name", "arch", "ffn"),
    [("vits", "small", "mlp"), ("vitb", "base", "mlp"), ("vitl", "large", "mlp"), ("vitg", "giant2", "swiglufused")],
)
def test_network_fits_the_released_weights(name, arch, ffn):
    cfg = load(name)
    assert (cfg.student.arch, cfg.student.ffn_layer) == (f"vit_{arch}", ffn)
    assert (cfg.student.patch_size, cfg.crops.local_crops_size) == (14, 98)
    assert cfg.train.centering == "sinkhorn_knopp"


@pytest.mark.parametrize("name", CONTINUED)
def test_training_on_moves_a_network_less_than_training_from_nothing(name):
    cfg, fresh = load(name), load(name.removeprefix("continue_").removesuffix("14"))
    for key in ("arch", "patch_size", "ffn_layer", "drop_path_rate"):
        assert cfg.student[key] == fresh.student[key]
    assert cfg.dino == fresh.dino and cfg.ibot == fresh.ibot and cfg.crops == fresh.crops
    assert cfg.optim.base_lr == pytest.approx(fresh.optim.base_lr / 5)
    assert cfg.student.freeze_backbone_epochs == 1 and cfg.optim.freeze_last_layer_epochs == 0
    assert cfg.optim.warmup_epochs == "10%"


def test_classic_dino_has_no_masks_no_koleo_and_the_papers_blur():
    cfg = load("dino_classic")
    assert (cfg.ibot.loss_weight, cfg.ibot.mask_sample_probability, cfg.dino.koleo_loss_weight) == (0, 0, 0)
    assert cfg.train.centering == "centering" and cfg.augmentation.blur_p == [1.0, 0.1, 0.5]
    assert cfg.optim.lr == pytest.approx(5e-4 * 64 / 256)


def test_small_is_for_runs_of_minutes_on_few_images():
    cfg = load("small")
    assert cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH <= 1000
    assert cfg.student.layerscale == 1 and cfg.dino.head_n_prototypes <= 1024 and cfg.teacher.momentum_teacher < 0.99
    assert cfg.optim.warmup_epochs < cfg.optim.epochs / 4
    assert cfg.teacher.warmup_teacher_temp_epochs < cfg.optim.epochs
    assert cfg.augmentation.blur_sigma[1] / cfg.crops.local_crops_size <= 2 / 96  # upstream's blur of its own crops


def test_small_trains_on_a_handful_of_images(tmp_path):
    make_textures(tmp_path / "images", per_family=1, size=64)
    recipe = next(path for path in RECIPES if path.stem == "small")
    arguments = ["--config-file", str(recipe), "--output-dir", str(tmp_path / "run")]
    arguments += [f"train.dataset_path={tmp_path / 'images'}", "train.max_steps=3", "train.log_every=1"]
    try:
        assert main(get_args_parser().parse_args([*arguments, "train.num_workers=0"])) == 0
    finally:
        remove_logging("dinov2")
    rows = [json.loads(line) for line in (tmp_path / "run" / "training_metrics.json").read_text().splitlines()]
    assert len(rows) == 3 and all(math.isfinite(row["total_loss"]) for row in rows)
    cfg = load_run_config(str(tmp_path / "run" / "config.yaml"))
    teacher = load_teacher(str(tmp_path / "run"))
    size = cfg.crops.global_crops_size
    assert teacher.image_size == size
    assert teacher.backbone(torch.zeros(1, 3, size, size)).isfinite().all()
