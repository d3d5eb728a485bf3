import pytest

from dinov2_custom.configs.combinations import check_combinations, list_notes
from dinov2_custom.configs.mistakes import Mistakes
from dinov2_custom.configs.schema import all_options


def problems(bad=(), **changes):
    """Check the defaults with `section__key=value` changes; keys in `bad` are already known to be wrong."""
    mistakes = Mistakes()
    mistakes.keys.update(bad)
    check_combinations(values_with(**changes), lambda key: "here", mistakes)
    return mistakes.lines


def values_with(**changes):
    values = {key: option.default for key, option in all_options().items()}
    return values | {key.replace("__", "."): value for key, value in changes.items()}


def test_defaults_go_together():
    assert problems() == []


def test_local_crop_that_patches_do_not_tile_names_both_keys_and_the_nearest_sizes():
    (line,) = problems(student__patch_size=14)
    assert line.startswith("crops.local_crops_size (here): expected a multiple of the patch size 14, got 96")
    assert "student.patch_size = 14 (here)" in line and line.endswith("use crops.local_crops_size=98 or 84")


def test_both_crop_sizes_are_reported():
    lines = problems(student__patch_size=15)
    assert [line.split(" ")[0] for line in lines] == ["crops.global_crops_size", "crops.local_crops_size"]
    assert "crops.global_crops_size=225 or 210" in lines[0]


def test_crop_smaller_than_a_patch_is_only_told_the_larger_size():
    (line,) = problems(crops__local_crops_size=10)
    assert line.endswith("use crops.local_crops_size=16")


def test_local_size_does_not_matter_without_local_crops():
    assert problems(student__patch_size=14, crops__local_crops_number=0) == []


def test_unknown_arch_lists_all_and_hides_checks_that_need_it():
    (line,) = problems(student__arch="vit_larg", student__block_chunks=100)
    assert "vit_nano, vit_micro, vit_tiny, vit_small, vit_base, vit_large, vit_giant2" in line
    assert line.endswith("did you mean vit_large?")


def test_memeff_arch_is_known():
    assert problems(student__arch="vit_large_memeff", student__block_chunks=24) == []


def test_more_chunks_than_blocks():
    (line,) = problems(student__arch="vit_nano", student__block_chunks=5)
    assert "at most the 4 blocks" in line and "student.arch = 'vit_nano'" in line


def test_warmup_longer_than_the_run_names_both_keys():
    (line,) = problems(optim__warmup_epochs=0.6, optim__epochs=0.5)
    assert (
        "optim.warmup_epochs (here)" in line
        and "optim.epochs = 0.5 (here)" in line
        and "=10% (of the run) or 0.05" in line
    )


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


def test_keys_already_wrong_are_left_alone():
    assert problems(bad=["student.patch_size"], student__patch_size=14) == []


def notes(**changes):
    values = values_with(optim__lr=1e-3) | {key.replace("__", "."): value for key, value in changes.items()}
    return list_notes(values, {key.replace("__", ".") for key in changes})


def test_defaults_have_no_notes():
    assert notes() == []


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"optim__epochs": 1, "optim__freeze_last_layer_epochs": 1}, "never train"),
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
def test_no_notes_where_all_is_meant(changes):
    assert notes(**changes) == []
