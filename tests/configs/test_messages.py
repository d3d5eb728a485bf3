"""The exact error messages for mistakes; the detection of mistakes is tested elsewhere."""

import pytest

from dinov2_custom.configs.load import load_run_config
from dinov2_custom.errors import ConfigError

# override -> text after "key (override): expected "
OF_THE_KEY = [
    ("train.seed='3'", "a whole number of at least 0, got '3' -> write the number without quotes"),
    ("student.patch_size=14.5", "a whole number of at least 1, got 14.5 -> the default is 16"),
    ("optim.epochs=0", "a number above 0, got 0 -> the default is 100"),
    (
        "train.OFFICIAL_EPOCH_LENGTH=dataset",
        "a whole number of at least 1 or auto, got 'dataset' -> the default is 1250",
    ),
    (
        "optim.warmup_epochs=101%",
        "a number of at least 0 or a share of the run such as 10%, got '101%' -> the default is 10",
    ),
    ("optim.clip_grad=none", "a number of at least 0 or null, got 'none' -> the default is 3.0"),
    ("student.drop_path_rate=1", "a number in [0, 1), got 1 -> the default is 0.3"),
    (
        "crops.global_crops_scale=[1,0.5]",
        "a list of 2 numbers in (0, 1], smaller first, got [1, 0.5] -> the default is [0.32, 1.0]",
    ),
    (
        "data.normalize.std=[1,1,0]",
        "a list of 3 numbers above 0, got [1, 1, 0] -> the default is [0.229, 0.224, 0.225]",
    ),
    ("train.path_preserved=[]", "text or a list of texts, got []"),
    ("train.dataset_path=[/a,3]", "text or a mapping or a list of texts and mappings, got ['/a', 3]"),
    ("student.qkv_bias=1", "true or false, got 1 -> the default is true"),
    ("train.centering=sinkhorn", "centering | sinkhorn_knopp, got 'sinkhorn' -> did you mean sinkhorn_knopp?"),
    ("train.seed=${nope}", "a whole number of at least 0, got '${nope}' -> Interpolation key 'nope' not found"),
    (
        "crops=5",
        "a section with keys global_crops_scale, local_crops_number, local_crops_scale, global_crops_size, "
        "local_crops_size, got 5",
    ),
    ("student.arch.x=1", "student.arch to have no parts, got one -> set student.arch itself"),
    ("train.batch_size=3", "a known key, got an unknown one -> did you mean train.batch_size_per_gpu?"),
    (
        "optim.warmup_epochs=200",
        "at most optim.epochs, got 200 with optim.epochs = 100 (default) -> set optim.warmup_epochs=10% (of the run) "
        "or 10, or raise optim.epochs",
    ),
    (
        "optim.global_batch=1023",
        "a multiple of the 2 processes, got 1023 -> start 1 or 3 processes, or for a new run set "
        "optim.global_batch=1022 or 1024",
    ),
]
OTHERS = [
    ("wandb={name: 5}", "wandb.name (override): expected text, got 5 -> put the text in quotes"),
    ("foo", "override: expected key=value, got 'foo' -> write key=value, without spaces around ="),
    (
        "student.patch_size=14",
        "crops.local_crops_size (default): expected a multiple of the patch size 14, got 96 with student.patch_size ="
        " 14 (override), crops.local_crops_number = 8 (default) -> use crops.local_crops_size=98 or 84",
    ),
]


MESSAGES = [(text, f"{text.partition('=')[0]} (override): expected {rest}") for text, rest in OF_THE_KEY] + OTHERS


@pytest.mark.parametrize(("override", "message"), MESSAGES)
def test_message(override, message):
    with pytest.raises(ConfigError) as error:
        load_run_config(None, ["train.dataset_path=/images", override], "out", world_size=2)
    assert str(error.value).splitlines()[:2] == ["1 mistake in the configuration:", f"  - {message}"]


def test_one_error_for_all():
    with pytest.raises(ConfigError) as error:
        load_run_config(None, ["train.sed=1", "train.seed=x"], require_dataset=False)
    assert str(error.value) == (
        "2 mistakes in the configuration:\n"
        "  - train.sed (override): expected a known key, got an unknown one -> did you mean train.seed?\n"
        "  - train.seed (override): expected a whole number of at least 0, got 'x' -> the default is 0\n"
        "Unknown keys on purpose, of a fork say: --allow-unknown-keys keeps them, unused."
    )
