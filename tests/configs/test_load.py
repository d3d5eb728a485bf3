import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ReadonlyConfigError

import dinov2_custom.configs
from dinov2_custom.configs.checks import Mistakes
from dinov2_custom.configs.load import (
    Setting,
    load_and_merge_config,
    load_config,
    load_run_config,
    parse_yaml,
    read_file,
    read_overrides,
    to_yaml,
)
from dinov2_custom.configs.schema import default_values
from dinov2_custom.errors import ConfigError

ROOT = Path(__file__).parents[2]
DATA = "train.dataset_path=/images"


def load(*overrides, file=None, notes=None, **options):
    """Load with a dataset; warnings are collected in `notes`, and without it none are expected."""
    seen = [] if notes is None else notes
    cfg = load_run_config(file, [DATA, *overrides], warn=seen.append, **options)
    assert notes is not None or seen == []
    return cfg


def mistakes(*overrides, **options):
    with pytest.raises(ConfigError) as error:
        load(*overrides, **options)
    return str(error.value)


def write(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_with_computed_lr_and_output_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = OmegaConf.to_container(load())
    assert cfg["train"]["output_dir"].startswith(f"{tmp_path}/outputs/")
    want = default_values()
    want["optim"]["lr"] = 0.004 * math.sqrt(64 / 1024)
    want["train"] |= {"dataset_path": "/images", "output_dir": cfg["train"]["output_dir"]}
    assert cfg == want


def test_overrides_win_over_file_over_defaults(tmp_path):
    path = write(tmp_path, "train: {seed: 1, num_workers: 2}\n")
    cfg = load("train.seed=3", "train.seed=4", file=path)
    assert (cfg.train.seed, cfg.train.num_workers, cfg.train.batch_size_per_gpu) == (4, 2, 64)


def test_a_bad_value_in_the_file_may_be_overridden(tmp_path):
    path = write(tmp_path, "student: {arch: dinov2_vitb14, patch_size: fourteen}\n")
    assert load("student.arch=vit_base", "student.patch_size=16", file=path).student.arch == "vit_base"


def test_result_is_read_only_and_strict():
    cfg = load()
    with pytest.raises(ReadonlyConfigError):
        cfg.train.seed = 1
    with pytest.raises(ConfigAttributeError):
        _ = cfg.train.sed


@pytest.mark.parametrize(
    ("base", "batch", "world", "lr"),
    [(4e-3, 64, 32, 0.00565685), (4e-3, 64, 1, 1e-3), (2e-4, 32, 96, 3.4641e-4)],
)
def test_lr_follows_the_square_root_rule(base, batch, world, lr):
    cfg = load(f"optim.base_lr={base}", f"train.batch_size_per_gpu={batch}", world_size=world)
    assert cfg.optim.lr == pytest.approx(lr, rel=1e-5)


def test_output_dir_argument_wins_over_override_over_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "train: {output_dir: from_file}\n")
    assert load(file=path).train.output_dir == f"{tmp_path}/from_file"
    assert load("train.output_dir=from_override", file=path).train.output_dir == f"{tmp_path}/from_override"
    cfg = load("train.output_dir=from_override", file=path, output_dir="/from/argument")
    assert cfg.train.output_dir == "/from/argument"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.yaml"], "loading makes nothing"


def test_missing_dataset_error_explains_how_to_set_it():
    with pytest.raises(ConfigError, match=r"add train\.dataset_path=/path/to/images to the command"):
        load_run_config(None, [])
    assert load_run_config("", [], require_dataset=False).train.dataset_path == ""


def test_list_of_datasets():
    assert load("train.dataset_path=[/a,/b]").train.dataset_path == ["/a", "/b"]
    mixed = "[{path: /a, weight: 0.7}, {kind: Tar, path: /b, weight: 0.3}]"
    assert load(f"train.dataset_path={mixed}").train.dataset_path == [
        {"path": "/a", "weight": 0.7},
        {"kind": "Tar", "path": "/b", "weight": 0.3},
    ]
    assert load("train.dataset_path={path: /a, column: x}").train.dataset_path.column == "x"


def test_all_mistakes_come_in_one_error_with_their_source(tmp_path):
    path = write(
        tmp_path,
        "train: {centering: sinkhorn, seed: '3'}\noptim: {warmup_epochs: 20}\nstudnt: {arch: vit_small}\n",
    )
    text = mistakes("optim.epochs=10", "student.patch_size=14", "train.batch_size=3", "foo", file=path)
    lines = text.splitlines()
    assert lines[0] == "7 mistakes in the configuration:"
    assert sorted(line.split(": ")[0] for line in lines[1:-1]) == [
        "  - crops.local_crops_size (default)",
        f"  - optim.warmup_epochs ({path})",
        "  - override",
        f"  - studnt ({path})",
        "  - train.batch_size (override)",
        f"  - train.centering ({path})",
        f"  - train.seed ({path})",
    ]
    assert "student.patch_size = 14 (override)" in text and "optim.epochs = 10 (override)" in text
    assert "--allow-unknown-keys" in lines[-1]


def test_missing_file_hides_mistakes_that_may_come_from_it():
    with pytest.raises(ConfigError) as error:
        load_run_config("no_such.yaml", ["student.patch_size=14", "train.seed=x"])
    assert str(error.value).startswith("2 mistakes") and "train.seed" in str(error.value)


def test_a_part_of_a_value_is_a_mistake_even_with_unknown_keys_allowed():
    text = mistakes("student.arch.foo=1", allow_unknown_keys=True)
    assert "student.arch.foo (override): expected student.arch to have no parts" in text


def test_unknown_keys_are_kept_with_one_warning_if_allowed(tmp_path):
    path = write(
        tmp_path,
        "tracker: {exp_name: x, tags: ['${tracker.exp_name}', '${student.arch}']}\ndaino: {loss_weight: 1}\n"
        "train: {save_every: 3}\n",
    )
    notes = []
    cfg = load("a=1", "a.b=2", file=path, notes=notes, allow_unknown_keys=True)
    assert list(cfg.tracker.tags) == ["x", "vit_large"]
    assert (cfg.train.save_every, cfg.daino.loss_weight, cfg.a.b) == (3, 1, 2)
    (note,) = notes
    assert note.splitlines() == [
        "unknown keys, kept but not used:",
        f"  tracker ({path}) with exp_name, tags",
        f"  daino ({path}) with loss_weight: the supervised side loss of a fork, which this package does not have",
        f"  train.save_every ({path}): checkpointing.period, in iterations",
        "  a (override)",
        "  a.b (override)",
    ]


def test_unused_keys_are_reported_once():
    notes = []
    load("train.saveckp_freq=5", "train.cache_dataset=false", "train.seed=1", notes=notes)
    (note,) = notes
    assert "train.saveckp_freq, train.cache_dataset" in note and "train.seed" not in note
    load("train.saveckp_freq=20")


def test_given_lr_is_ignored_with_a_warning():
    notes = []
    assert load("optim.lr=0.5", notes=notes).optim.lr == 1e-3
    assert notes == ["optim.lr = 0.5 is ignored: it is computed from optim.base_lr as 0.001"]


@pytest.mark.parametrize("world", [1, 3, 64])
def test_lr_of_a_run_on_another_number_of_processes_is_no_surprise(world, tmp_path):
    cfg = load("optim.base_lr=3e-4", "train.batch_size_per_gpu=7", world_size=world)
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    assert load(file=str(tmp_path / "config.yaml"), world_size=2).optim.lr != cfg.optim.lr


def test_given_lr_in_a_file_is_ignored_with_a_warning(tmp_path):
    notes = []
    load(file=write(tmp_path, "optim: {lr: 0.0015}\n"), notes=notes)
    assert len(notes) == 1 and "optim.lr = 0.0015 is ignored" in notes[0]


def test_warnings_go_to_the_log_by_default(caplog):
    with caplog.at_level(logging.WARNING):
        load_run_config(None, [DATA, "train.saveckp_freq=5"])
    assert "train.saveckp_freq" in caplog.text


def test_a_finished_config_loads_again_unchanged_and_silently(tmp_path):
    short = ["optim.epochs=0.5", "optim.warmup_epochs=0.1", "optim.freeze_last_layer_epochs=0"]
    cfg = load(*short, "crops.local_crops_number=0", "train.OFFICIAL_EPOCH_LENGTH=auto")
    path = tmp_path / "config.yaml"
    OmegaConf.save(cfg, path)
    assert load(file=str(path)) == cfg


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("student.layerscale=null", "student", "layerscale", None),
        ("optim.clip_grad=null", "optim", "clip_grad", None),
        ("optim.base_lr=1", "optim", "base_lr", 1.0),
        ("optim.base_lr=1e-3", "optim", "base_lr", 1e-3),
        ("student.block_chunks=4", "student", "block_chunks", 4),
        ("crops.local_crops_number=0", "crops", "local_crops_number", 0),
        ("ibot.loss_weight=0", "ibot", "loss_weight", 0.0),
        ("train.OFFICIAL_EPOCH_LENGTH=auto", "train", "OFFICIAL_EPOCH_LENGTH", "auto"),
        ("teacher.final_momentum_teacher=1", "teacher", "final_momentum_teacher", 1.0),
        ("optim.warmup_epochs=0.5", "optim", "warmup_epochs", 0.5),
        ("train.seed=${oc.env:A_SEED}", "train", "seed", 7),
        ("crops.local_crops_scale=[0.05,'${crops.global_crops_scale.0}']", "crops", "local_crops_scale", [0.05, 0.32]),
        ("train.path_preserved=${train.dataset_path}/held", "train", "path_preserved", "/images/held"),
    ],
)
def test_values_that_must_work(override, section, key, value, monkeypatch):
    monkeypatch.setenv("A_SEED", "7")
    got = OmegaConf.to_container(load(override, notes=[]))[section][key]
    assert got == value and type(got) is type(value)


def test_what_comes_from_the_environment_is_resolved_at_use_only(tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    monkeypatch.setenv("A_SEED", "7")
    path = write(
        tmp_path,
        "train: {dataset_path: '${oc.env:A_SECRET}/images', seed: '${oc.env:A_SEED}'}\n"
        "wandb: {entity: '${mine.token}', project: '${oc.decode:${oc.env:A_SECRET}}', tags: [a, '${oc.env:A_SECRET}']}"
        "\nmine: {token: '${oc.env:A_SECRET}'}",
    )
    cfg = load_run_config(path, allow_unknown_keys=True)
    assert (cfg.train.dataset_path, cfg.wandb.entity, cfg.wandb.tags[1]) == ("hunter2/images", "hunter2", "hunter2")
    assert cfg.train.seed == 7
    assert "hunter2" not in to_yaml(cfg) and "hunter2" not in repr(OmegaConf.to_container(cfg))
    (tmp_path / "again.yaml").write_text(to_yaml(cfg))
    assert load_run_config(str(tmp_path / "again.yaml"), allow_unknown_keys=True) == cfg


def test_a_variable_that_is_gone_matters_only_where_it_is_used(tmp_path, monkeypatch):
    path = write(tmp_path, "train: {dataset_path: '${oc.env:NO_SUCH_VARIABLE}/images'}\nstudent: {arch: vit_small}")
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        load_run_config(path)
    assert load_run_config(path, require_dataset=False, training=False).student.arch == "vit_small"


@pytest.mark.parametrize("text", ["${nope}", "${x", "${oc.env:NO_SUCH_VARIABLE}", "${oc.env:A_LIST}"])
def test_references_that_lead_nowhere(text, monkeypatch):
    monkeypatch.setenv("A_LIST", "[")
    lines = mistakes(f"train.seed={text}", "optim.min_lr=${optim.base_lr}").splitlines()
    assert len(lines) == 2 and lines[1].startswith("  - train.seed (override): expected a ")


def test_forks_config_with_lists_of_folders(tmp_path):
    path = write(
        tmp_path,
        "train:\n  dataset_path:\n    - /data/a\n    - /data/b\n  path_preserved:\n    - /data/b\n  frac: 0.1\n"
        "student: {arch: vit_large, patch_size: 14, num_register_tokens: 4, pretrained_weights: }\n"
        "optim: {warmup_epochs: 80}\ncrops: {local_crops_size: 98}\n",
    )
    cfg = load_run_config(path)
    assert cfg.train.dataset_path == ["/data/a", "/data/b"] and cfg.train.path_preserved == ["/data/b"]
    assert cfg.student.pretrained_weights == ""


def test_packaged_configs_load():
    paths = sorted((ROOT / "dinov2_custom" / "configs").rglob("*.yaml"))
    assert len(paths) == 12
    for path in paths:
        load_run_config(str(path), require_dataset=False, warn=pytest.fail)


def test_upstreams_defaults_load_as_a_file(tmp_path):
    path = ROOT / "tests" / "contracts" / "upstream_config_defaults.yaml"
    cfg = load_run_config(str(path), warn=pytest.fail)
    assert cfg.compute_precision.student.backbone.mixed_precision.param_dtype == "fp16"


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", "-3", "-nan"])
def test_a_length_that_is_no_length_is_one_error(value):
    keys = ("optim.epochs", "optim.warmup_epochs", "train.max_hours", "train.max_steps")
    with pytest.raises(ConfigError) as caught:
        load_run_config("", [f"{key}={value}" for key in keys], "out", require_dataset=False)
    text = str(caught.value)
    assert "4 mistakes" in text and all(f"{key} (override): expected a " in text for key in keys)
    assert "quotes" not in text and "the default is 100" in text


def test_without_training_there_are_no_warnings_of_it():
    given, seen = ["ibot.head_n_prototypes=4", "of.a.fork=1"], []
    load_run_config("", given, "out", allow_unknown_keys=True, require_dataset=False, training=False, warn=seen.append)
    (unknown,) = seen
    assert "of.a.fork" in unknown
    load_run_config("", given[:1], "out", require_dataset=False, warn=seen.append)
    assert "ibot.head_n_prototypes" in seen[1]


def test_one_length_of_two():
    with pytest.raises(ConfigError, match="choose one of them"):
        load_run_config("", ["train.max_hours=1", "train.max_steps=5"], "out", require_dataset=False)


def overrides(*texts):
    mistakes = Mistakes()
    settings = read_overrides(texts, mistakes)
    return [(setting.key, setting.value) for setting in settings], mistakes.lines


def file(path, text):
    path.write_text(text)
    mistakes = Mistakes()
    return read_file(str(path), mistakes), mistakes.lines


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("1e-3", 1e-3),
        ("2.0e-04", 2e-4),
        ("[0.1,0.5]", [0.1, 0.5]),
        ("null", None),
        ("", None),
        ("-1", -1),
        ("'1'", "1"),
        ("${oc.env:HOME}", "${oc.env:HOME}"),
    ],
)
def test_values_are_yaml(text, value):
    assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value)
    assert overrides(f"optim.base_lr={text}") == ([("optim.base_lr", value)], [])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/a b/c: d #1", "/a b/c: d #1"),
        ("2024", "2024"),
        ("ImageNet:split=TRAIN:root=/a:extra=/b", "ImageNet:split=TRAIN:root=/a:extra=/b"),
        (r"C:\new", r"C:\new"),
        ("[/a,/b c]", ["/a", "/b c"]),
        ("'[/a]'", "[/a]"),
        ("[{path: /a, weight: 0.7}, /b]", [{"path": "/a", "weight": 0.7}, "/b"]),
        ("{path: 'a:b', column: x}", {"path": "a:b", "column": "x"}),
        ("{a,b}/s-{0..3}.tar", "{a,b}/s-{0..3}.tar"),
        ("{a,b}", "{a,b}"),
        ("null", None),
        ("", ""),
    ],
)
def test_texts_are_taken_as_they_stand(text, value):
    assert overrides(f"train.dataset_path={text}") == ([("train.dataset_path", value)], [])


def test_a_whole_section_can_be_given():
    settings, lines = overrides("optim={epochs: 20, base_lr: 5e-4}")
    assert settings == [("optim.epochs", 20), ("optim.base_lr", 5e-4)] and lines == []


def test_bad_overrides_are_all_reported():
    malformed = ["foo", "=3", "train..seed=2", "a b=1"]
    settings, lines = overrides("train.seed=1", *malformed, "optim.min_lr=[0.1,", "student=5")
    assert settings == [("train.seed", 1)]
    where = [line.split(":")[0] for line in lines]
    assert where == ["override"] * 4 + ["optim.min_lr (override)", "student (override)"]
    assert "a section with keys arch, patch_size, " in lines[-1]


def test_no_file_is_no_settings():
    assert read_file(None, Mistakes()) == read_file("", Mistakes()) == []


def test_file_is_flattened_and_unknown_sections_stay_whole(tmp_path):
    path = tmp_path / "x.yaml"
    settings, lines = file(path, "train:\n  seed: 3\nteacher:\ncrops: {}\ntune:\n  knn: {k: 1}\noptim.epochs: 2\n")
    assert lines == []
    assert settings == [
        Setting("train.seed", 3, str(path)),
        Setting("tune", {"knn": {"k": 1}}, str(path)),
        Setting("optim.epochs", 2, str(path)),
    ]


def test_empty_file_is_fine(tmp_path):
    assert file(tmp_path / "x.yaml", "# nothing\n") == ([], [])


@pytest.mark.parametrize("text", ["a: [", "a: 1\na: 2\n", "5", "- a", "a: ${b", "\tx: 1"])
def test_files_that_are_no_configuration(tmp_path, text):
    settings, (line,) = file(tmp_path / "x.yaml", text)
    assert settings is None and line.startswith(f"--config-file {tmp_path}/x.yaml: expected ")
    assert "\n" not in line


def test_file_that_is_no_text_or_a_folder(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    mistakes = Mistakes()
    assert read_file(str(tmp_path / "x.yaml"), mistakes) is None
    assert read_file(str(tmp_path), mistakes) is None
    assert len(mistakes.lines) == 2


def test_missing_file_names_near_ones_and_those_in_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    for name in ("vits.yaml", "cells.yaml"):
        (tmp_path / "configs" / name).write_text("")
    mistakes = Mistakes()
    assert read_file("cell.yaml", mistakes) is None
    (line,) = mistakes.lines
    assert "did you mean configs/cells.yaml? there is: configs/cells.yaml, configs/vits.yaml" in line


def test_missing_file_of_upstreams_path_is_found_in_the_package():
    mistakes = Mistakes()
    read_file("dinov2/configs/train/vitl16_short.yaml", mistakes)
    assert "dinov2_custom/configs/train/vitl16_short.yaml" in mistakes.lines[0]


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


def test_importing_the_package_and_its_paths_loads_nothing_heavy():
    code = "import sys, dinov2_custom.configs.paths"
    code += "; assert not {'omegaconf', 'pydantic', 'yaml', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
