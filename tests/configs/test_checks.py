import pytest

from dinov2_custom.configs.checks import (
    Mistakes,
    check_combinations,
    explain_bad_override,
    list_notes,
    plain_arch_name,
    suggest_key,
)
from dinov2_custom.configs.load import load_run_config
from dinov2_custom.configs.schema import all_keys
from dinov2_custom.errors import ConfigError


def problems(bad=(), **changes):
    """Check the defaults with `section__key=value` changes; keys in `bad` are already reported as invalid."""
    mistakes = Mistakes()
    mistakes.keys.update(bad)
    check_combinations(values_with(**changes), lambda key: "here", mistakes)
    return mistakes.lines


def values_with(**changes):
    values = {key: field.default for key, field in all_keys().items()}
    return values | {key.replace("__", "."): value for key, value in changes.items()}


def test_defaults_go_together():
    assert problems() == []


def test_local_crop_that_patches_do_not_tile_names_both_keys_and_the_nearest_sizes():
    (line,) = problems(student__patch_size=14)
    assert line.startswith("crops.local_crops_size (here)") and "student.patch_size = 14 (here)" in line
    assert "crops.local_crops_size=98 or 84" in line


def test_both_crop_sizes_are_reported():
    lines = problems(student__patch_size=15)
    assert [line.split(" ")[0] for line in lines] == ["crops.global_crops_size", "crops.local_crops_size"]
    assert "crops.global_crops_size=225 or 210" in lines[0]


def test_crop_smaller_than_a_patch_may_only_be_larger():
    (line,) = problems(crops__local_crops_size=10)
    assert line.endswith("crops.local_crops_size=16")


def test_local_size_does_not_matter_without_local_crops():
    assert problems(student__patch_size=14, crops__local_crops_number=0) == []


def test_unknown_arch_lists_all_and_hides_checks_that_need_it():
    (line,) = problems(student__arch="vit_larg", student__block_chunks=100)
    assert "vit_nano, vit_micro, vit_tiny, vit_small, vit_base, vit_large, vit_giant2" in line
    assert "vit_large?" in line


def test_memeff_arch_is_known():
    assert problems(student__arch="vit_large_memeff", student__block_chunks=24) == []


def test_more_chunks_than_blocks():
    (line,) = problems(student__arch="vit_nano", student__block_chunks=5)
    assert "4 blocks" in line and "student.arch = 'vit_nano'" in line


def test_warmup_longer_than_the_run_names_both_keys():
    (line,) = problems(optim__warmup_epochs=0.6, optim__epochs=0.5)
    assert "optim.warmup_epochs (here)" in line and "optim.epochs = 0.5 (here)" in line and "0.05" in line


def test_warmup_as_long_as_the_run_is_fine():
    assert problems(optim__warmup_epochs=0.5, optim__epochs=0.5) == []


@pytest.mark.parametrize(("dino", "ibot", "count"), [(0.0, 0.0, 1), (0.0, 1.0, 0), (1.0, 0.0, 0)])
def test_one_of_the_losses_is_needed(dino, ibot, count):
    assert len(problems(dino__loss_weight=dino, ibot__loss_weight=ibot)) == count


@pytest.mark.parametrize(("frac", "places", "count"), [(0, "", 0), (1, "", 0), (0.1, "", 1), (0.1, "/images", 0)])
def test_a_share_to_hold_out_needs_a_place(frac, places, count):
    assert len(problems(train__frac=frac, train__path_preserved=places)) == count


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("dinov2_vitb14", "student.arch=vit_base student.patch_size=14"),
        ("dinov2_vits14_reg", "student.arch=vit_small student.patch_size=14 student.num_register_tokens=4"),
        ("vitl16", "student.arch=vit_large student.patch_size=16"),
        ("vit_g", "student.arch=vit_giant2"),
        ("vitb14_reg2", "student.arch=vit_base student.patch_size=14 student.num_register_tokens=2"),
    ],
)
def test_the_name_of_released_weights_is_no_arch(arch, settings):
    (line,) = problems(student__arch=arch)
    assert line.endswith(f"-> set {settings}")


def test_keys_already_invalid_are_skipped():
    assert problems(bad=["student.patch_size"], student__patch_size=14) == []


def notes(**changes):
    values = values_with(optim__lr=1e-3) | {key.replace("__", "."): value for key, value in changes.items()}
    return list_notes(values, {key.replace("__", ".") for key in changes})


def test_defaults_have_no_notes():
    assert notes() == []


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"optim__epochs": 1, "optim__freeze_last_layer_epochs": 1}, "are never trained"),
        ({"ibot__mask_sample_probability": 0.0}, "mask nothing"),
        ({"ibot__mask_ratio_min_max": [0.0, 0.0]}, "mask nothing"),
        ({"ibot__head_n_prototypes": 7}, "ibot.separate_head is false: ibot.head_n_prototypes"),
        ({"optim__min_lr": 0.1}, "rises"),
        ({"train__saveckp_freq": 3, "train__cache_dataset": False}, "train.saveckp_freq, train.cache_dataset"),
    ],
)
def test_notes(changes, fragment):
    (note,) = notes(**changes)
    assert fragment in note


@pytest.mark.parametrize(
    "changes",
    [
        {"ibot__mask_sample_probability": 0.0, "ibot__loss_weight": 0.0},
        {"ibot__head_n_prototypes": 7, "ibot__separate_head": True},
        {"teacher__warmup_teacher_temp_epochs": 500},
        {"train__seed": 3},
    ],
)
def test_no_notes_for_intended_settings(changes):
    assert notes(**changes) == []


def load(*overrides, file=None, world_size=1):
    cfg = load_run_config(file, overrides, "out", require_dataset=False, world_size=world_size, warn=pytest.fail)
    assert cfg.train.batch_size_per_gpu * cfg.optim.accumulation_steps * world_size == cfg.optim.global_batch
    return cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps, cfg.optim.lr


@pytest.mark.parametrize(
    ("whole", "processes", "bounds", "batch", "accumulated"),
    [
        (1024, 1, [], 1024, 1),
        (1024, 16, [], 64, 1),
        (1024, 8, ["train.batch_size_per_gpu=64"], 64, 2),
        (1024, 32, ["train.batch_size_per_gpu=64"], 32, 1),  # the most at once
        (1024, 8, ["train.batch_size_per_gpu=100"], 64, 2),
        (96, 4, ["train.batch_size_per_gpu=10"], 8, 3),
        (22, 2, ["train.batch_size_per_gpu=8"], 1, 11),
        (7, 7, [], 1, 1),
        (1024, 2, ["optim.accumulation_steps=4"], 128, 4),
        (24, 1, ["optim.accumulation_steps=5"], 4, 6),  # the fewest batches
        (64, 1, ["optim.accumulation_steps=4", "train.batch_size_per_gpu=8"], 8, 8),
    ],
)
def test_the_product_is_the_global_batch(whole, processes, bounds, batch, accumulated):
    overrides = [f"optim.global_batch={whole}", "optim.base_lr=0.001", *bounds]
    assert load(*overrides, world_size=processes)[:2] == (batch, accumulated)
    assert load(*overrides, world_size=processes)[2] == pytest.approx(0.001 * (whole / 1024) ** 0.5)


def test_values_of_a_recipe_or_another_run_are_replaced(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("train: {batch_size_per_gpu: 2}\noptim: {global_batch: 64, accumulation_steps: 16}\n")
    assert load(file=file, world_size=4)[:2] == (16, 1)
    assert load("train.batch_size_per_gpu=4", file=file, world_size=4)[:2] == (4, 4)


def test_without_it_nothing_changes():
    overrides = ["train.batch_size_per_gpu=3", "optim.accumulation_steps=5"]
    cfg = load_run_config("", overrides, "out", require_dataset=False, world_size=7)
    assert (cfg.train.batch_size_per_gpu, cfg.optim.accumulation_steps, cfg.optim.global_batch) == (3, 5, 0)


@pytest.mark.parametrize(
    ("overrides", "processes", "named"),
    [
        (["optim.global_batch=1024"], 6, ["optim.global_batch (override)", " 4 or 8 ", "=1020 or 1026"]),
        (["optim.global_batch=8"], 16, ["optim.global_batch (override)", " 8 processes", "=16"]),
        (
            ["optim.global_batch=8", "optim.accumulation_steps=5"],
            2,
            ["optim.accumulation_steps (override)", " 4 images", " 5 ", "optim.global_batch = 8 in 2 processes"],
        ),
        (["optim.global_batch=-8"], 1, ["optim.global_batch (override)", "-8"]),
    ],
)
def test_indivisible_batch_is_reported_with_the_other_mistakes(overrides, processes, named):
    with pytest.raises(ConfigError) as caught:
        load_run_config("", [*overrides, "student.patch_size=x"], world_size=processes, require_dataset=False)
    (line,) = [line for line in str(caught.value).splitlines()[1:] if "student.patch_size" not in line]
    assert all(part in line for part in named)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("optim.batch_size_per_gpu", "did you mean train.batch_size_per_gpu?"),
        ("train.epochs", "did you mean optim.epochs?"),
        ("epochs", "did you mean optim.epochs?"),
        ("optim.epoch", "did you mean optim.epochs?"),
        ("train.official_epoch_length", "did you mean train.OFFICIAL_EPOCH_LENGTH?"),
        ("batch_size", "did you mean train.batch_size_per_gpu?"),
        ("train.lr", "did you mean optim.base_lr?"),
        ("optimizer", "did you mean optim?"),
        ("crops.loss_weight", "did you mean dino.loss_weight or ibot.loss_weight?"),
        ("student.regsters", ""),
        ("train.use_torch_compile", "did you mean train.compile?"),
        ("use_torch_compile", "did you mean train.compile?"),
        ("optim.warmup_pct", "optim.warmup_epochs with a share of the run, such as 10%"),
        ("zzz", ""),
    ],
)
def test_suggestions_reach_across_sections(key, suggestion):
    assert suggest_key(key) == suggestion


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("configs/vits.yaml", "--config-file configs/vits.yaml"),
        ("train.seed", "train.seed=VALUE"),
        ("train.seed:3", "= instead of the first colon"),
        ("train.sed", "train.seed=VALUE?"),
        ("zzz", "key=value"),
        ("/tmp", "train.dataset_path=/tmp"),
        ("/b]", "'key=[a, b]'"),
    ],
)
def test_bad_overrides_are_explained(text, advice):
    assert advice in explain_bad_override(text)


def test_all_mistakes_are_raised_at_once():
    mistakes = Mistakes()
    mistakes.raise_if_any()
    mistakes.add("a (file)", "b", "c", "d", key="a")
    mistakes.add("e", "f", "g")
    mistakes.advice = "h"
    with pytest.raises(ConfigError) as error:
        mistakes.raise_if_any()
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "2 mistakes in the configuration",
        "  - a (file)",
        "  - e",
        "h",
    ]
    assert mistakes.keys == {"a"}


def test_memeff_suffix_is_stripped():
    assert plain_arch_name("vit_small_memeff") == plain_arch_name("vit_small") == "vit_small"


def test_keys_in_a_section_of_a_fork_are_explained_as_the_section():
    assert suggest_key("tune.foo") == suggest_key("tune") != ""
    assert suggest_key("tune.knn.k") == suggest_key("tune")
