from pathlib import Path

import pytest

from dinov2_custom.decoder.settings import LossWeights, Settings, read_settings
from dinov2_custom.errors import ConfigError


def test_settings_are_typed_and_nested():
    settings = read_settings(["lr=1e-4", "loss.giou=1", "frozen=true", "wandb.mode=offline"])
    assert (settings.lr, settings.loss.giou, settings.frozen, settings.wandb.mode) == (1e-4, 1.0, True, "offline")
    assert settings.loss.box == read_settings([]).loss.box


def test_all_mistakes_of_settings_are_listed():
    with pytest.raises(ConfigError) as error:
        read_settings(["bacth=2", "lr=-1", "loss.gio=1", "precision=int8"])
    assert all(name in str(error.value) for name in ("bacth", "lr:", "loss.gio", "precision"))


def test_the_documents_list_every_key_with_its_default():
    page = (Path(__file__).resolve().parents[2] / "docs" / "decoder.md").read_text()
    for section, prefix in ((Settings, ""), (LossWeights, "loss.")):
        for name, field in section.model_fields.items():
            if field.default_factory is None:
                default = str(field.default).lower() if isinstance(field.default, bool) else f"{field.default}"
                default = f"{field.default:g}" if prefix else default
                assert f"| `{prefix}{name}` | {default} | {field.description} |" in page, name
