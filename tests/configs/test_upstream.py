import subprocess
import sys

import pytest
from omegaconf import OmegaConf

import dinov2_custom.configs
from dinov2_custom.configs.upstream import load_and_merge_config, load_config
from dinov2_custom.errors import ConfigError


def test_default_config_has_all_sections_and_can_be_edited():
    cfg = OmegaConf.merge(dinov2_custom.configs.dinov2_default_config, {"train": {"seed": 4}})
    assert cfg.train.seed == 4 and cfg.student.arch == "vit_large" and cfg.crops.global_crops_size == 224


def test_upstreams_names_are_attributes_of_the_package():
    assert dinov2_custom.configs.load_config is load_config
    assert set(dinov2_custom.configs.__all__) <= set(dir(dinov2_custom.configs))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dinov2_custom.configs.no_such_name


@pytest.mark.parametrize("arch", ["vit_small", "vit_base", "vit_large", "vit_giant2"])
@pytest.mark.parametrize("registers", [0, 4])
def test_eval_configs_describe_the_released_networks(arch, registers):
    name, ffn = arch.removeprefix("vit_")[0], "swiglufused" if arch == "vit_giant2" else "mlp"
    student = load_and_merge_config(f"eval/vit{name}14_{'reg4_' if registers else ''}pretrain").student
    assert (student.arch, student.ffn_layer, student.patch_size) == (arch, ffn, 14)
    assert student.num_register_tokens == registers
    assert (student.interpolate_antialias, student.interpolate_offset) == ((True, 0.0) if registers else (False, 0.1))


def test_eval_configs_have_the_released_grid():
    crops = load_config("eval/vits14_pretrain").crops
    assert crops == {"global_crops_size": 518, "local_crops_size": 98}


@pytest.mark.parametrize(("name", "arch", "batch"), [("vitl14", "vit_large", 32), ("vitg14", "vit_giant2", 12)])
def test_long_train_configs_have_upstreams_values(name, arch, batch):
    assert load_config(f"train/{name}") == {
        "dino": {"head_n_prototypes": 131072, "head_bottleneck_dim": 384},
        "ibot": {"separate_head": True, "head_n_prototypes": 131072},
        "train": {"batch_size_per_gpu": batch, "dataset_path": "ImageNet22k", "centering": "sinkhorn_knopp"},
        "student": {
            "arch": arch,
            "patch_size": 14,
            "drop_path_rate": 0.4,
            "ffn_layer": "swiglufused",
            "block_chunks": 4,
        },
        "teacher": {"momentum_teacher": 0.994},
        "optim": {
            "epochs": 500,
            "weight_decay_end": 0.2,
            "base_lr": 2e-4,
            "warmup_epochs": 80,
            "layerwise_decay": 1.0,
        },
        "crops": {"local_crops_size": 98},
    }


def test_short_train_config_has_upstreams_values():
    assert load_config("train/vitl16_short") == {
        "train": {"dataset_path": "ImageNet:split=TRAIN", "batch_size_per_gpu": 64},
        "student": {"block_chunks": 4},
    }


def test_unknown_name_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"did you mean 'train/vitl14'\? there is: eval/.*, train/vitl16_short"):
        load_config("train/vitl_14")


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, dinov2_custom.configs; assert not {'omegaconf', 'yaml', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
