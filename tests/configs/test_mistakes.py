import pytest

from dinov2_custom.configs.mistakes import Mistakes, explain_bad_override, suggest_key
from dinov2_custom.errors import ConfigError


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
        ("configs/vits.yaml", "for a config file write --config-file configs/vits.yaml"),
        ("train.seed", "write train.seed=VALUE"),
        ("train.seed:3", "write = instead of the first colon"),
        ("train.sed", "did you mean train.seed=VALUE?"),
        ("zzz", "write key=value, without spaces around ="),
        ("/tmp", "for images write train.dataset_path=/tmp"),
        ("/b]", "a list or mapping with blanks needs quotes around the whole override: 'key=[a, b]'"),
    ],
)
def test_bad_overrides_are_explained(text, advice):
    assert explain_bad_override(text) == advice


def test_all_mistakes_are_raised_at_once():
    mistakes = Mistakes()
    mistakes.raise_if_any()
    mistakes.add("a (file)", "b", "c", "d", key="a")
    mistakes.add("e", "f", "g")
    mistakes.advice = "h"
    with pytest.raises(ConfigError) as error:
        mistakes.raise_if_any()
    assert str(error.value) == (
        "2 mistakes in the configuration:\n  - a (file): expected b, got c -> d\n  - e: expected f, got g\nh"
    )
    assert mistakes.keys == {"a"}
