from pathlib import Path

import pytest

from dinov2_custom.decoder.settings import LossWeights, Settings, read_settings
from dinov2_custom.errors import ConfigError
from dinov2_custom.run.decoder.train import DecoderTraining


def test_settings_are_typed_and_nested():
    settings = read_settings(["lr=1e-4", "loss.giou=1", "frozen=true", "wandb.mode=offline"])
    assert (settings.lr, settings.loss.giou, settings.frozen, settings.wandb.mode) == (1e-4, 1.0, True, "offline")
    assert settings.loss.box == read_settings([]).loss.box


def test_all_mistakes_of_settings_are_listed():
    with pytest.raises(ConfigError) as error:
        read_settings(["bacth=2", "lr=-1", "loss.gio=1", "precision=int8", "epochs='3'", "loss=3", "zzz=1", "loss.box"])
    for said in (
        "8 mistakes in the decoder's settings",
        "bacth (override): expected a known key, got an unknown one -> did you mean batch?",
        "lr (override): expected a number above 0, got -1",
        "did you mean loss.giou?",
        "precision (override): expected fp32 | bf16 | fp16, got 'int8'",
        "write the number without quotes",
        "expected a section with keys classes, box, giou, mask, dice, got 3",
        "zzz (override): expected a known key, got an unknown one -> see docs/decoder.md",
        "write loss.box=VALUE",
    ):
        assert said in str(error.value)


def test_settings_that_are_not_key_value_are_explained_from_these_keys(capsys):
    flags = "--backbone x --task detection --train a --val b --output-dir c bach /tmp lr:3".split()
    with pytest.raises(SystemExit):
        DecoderTraining.parser().parse_args(flags)
    said = capsys.readouterr().err
    assert "did you mean batch=VALUE?" in said and "instead of the first colon" in said and "dataset_path" not in said


def test_the_documents_list_every_key_with_its_default():
    page = (Path(__file__).resolve().parents[2] / "docs" / "decoder.md").read_text()
    for section, prefix in ((Settings, ""), (LossWeights, "loss.")):
        for name, field in section.model_fields.items():
            if field.default_factory is None:
                default = str(field.default).lower() if isinstance(field.default, bool) else f"{field.default}"
                default = f"{field.default:g}" if prefix else default
                assert f"| `{prefix}{name}` | {default} | {field.description} |" in page, name
