import pytest

from dinov2_custom.configs.schema import all_options
from dinov2_custom.configs.values import coerce, expected, is_quoted_or_list


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
    fitted = coerce(all_options()[key], value)
    assert fitted == result and type(fitted) is type(result)


@pytest.mark.parametrize(
    ("key", "value", "expectation"),
    [
        ("optim.base_lr", "1e-3", "a number of at least 0"),
        ("optim.base_lr", True, "a number of at least 0"),
        ("optim.base_lr", -1e-3, "a number of at least 0"),
        ("optim.base_lr", float("nan"), "a number of at least 0"),
        ("optim.base_lr", None, "a number of at least 0"),
        ("optim.epochs", float("inf"), "a number above 0"),
        ("optim.epochs", 0, "a number above 0"),
        ("optim.warmup_epochs", "101%", "a number of at least 0 or a share of the run such as 10%"),
        ("optim.warmup_epochs", "-1%", "a number of at least 0 or a share of the run such as 10%"),
        ("optim.warmup_epochs", "ten", "a number of at least 0 or a share of the run such as 10%"),
        ("optim.warmup_epochs", None, "a number of at least 0 or a share of the run such as 10%"),
        ("optim.epochs", "10%", "a number above 0"),
        ("train.max_steps", -1, "a whole number of at least 0"),
        ("student.drop_path_rate", 1.0, "a number in [0, 1)"),
        ("student.patch_size", 14.5, "a whole number of at least 1"),
        ("student.patch_size", [14, 14], "a whole number of at least 1"),
        ("train.batch_size_per_gpu", 0, "a whole number of at least 1"),
        ("student.qkv_bias", 1, "true or false"),
        ("student.arch", 5, "text"),
        ("train.centering", "sinkhorn", "centering | sinkhorn_knopp"),
        ("train.OFFICIAL_EPOCH_LENGTH", "dataset", "a whole number of at least 1 or auto"),
        ("ibot.mask_ratio_min_max", [0.5, 0.1], "a list of 2 numbers in [0, 1], smaller first"),
        ("ibot.mask_ratio_min_max", [0.1, 0.5, 0.6], "a list of 2 numbers in [0, 1], smaller first"),
        ("ibot.mask_ratio_min_max", 0.5, "a list of 2 numbers in [0, 1], smaller first"),
        ("crops.global_crops_scale", [0.0, 1.0], "a list of 2 numbers in (0, 1], smaller first"),
        ("augmentation.blur_p", [0.1, 0.2], "a list of 3 numbers in [0, 1]"),
        ("train.path_preserved", [], "text or a list of texts"),
        ("train.path_preserved", ["/a", 3], "text or a list of texts"),
        ("train.dataset_path", [], "text or a mapping or a list of texts and mappings"),
        ("train.dataset_path", ["/a", 3], "text or a mapping or a list of texts and mappings"),
        ("train.dataset_path", {}, "text or a mapping or a list of texts and mappings"),
        ("optim.clip_grad", "none", "a number of at least 0 or null"),
    ],
)
def test_illegal_values_say_what_was_expected(key, value, expectation):
    with pytest.raises(ValueError) as error:
        coerce(all_options()[key], value)
    assert str(error.value) == expectation == expected(all_options()[key])


@pytest.mark.parametrize("text", ["'a'", '"a b"', "[/a, /b]", " null", "~"])
def test_texts_that_are_yaml(text):
    assert is_quoted_or_list(text)


@pytest.mark.parametrize("text", ["/a: b", "/a #1", "'", "[x", "{a: b}", "nullable", ""])
def test_texts_that_stand_for_themselves(text):
    assert not is_quoted_or_list(text)
