import pytest

from dinov2_custom.decoder.settings import read_settings
from dinov2_custom.errors import ConfigError


def test_settings_are_typed_and_nested():
    settings = read_settings(["lr=1e-4", "loss.giou=1", "frozen=true", "wandb.mode=offline"])
    assert (settings.lr, settings.loss.giou, settings.frozen, settings.wandb.mode) == (1e-4, 1.0, True, "offline")
    assert settings.loss.box == read_settings([]).loss.box


def test_all_mistakes_of_settings_are_listed():
    with pytest.raises(ConfigError) as error:
        read_settings(["bacth=2", "lr=-1", "loss.gio=1", "precision=int8"])
    assert all(name in str(error.value) for name in ("bacth", "lr:", "loss.gio", "precision"))
