from pathlib import Path

import yaml

from dinov2_custom.configs.document import schema_doc, schema_yaml
from dinov2_custom.configs.schema import all_keys, default_values

ROOT = Path(__file__).parents[2]


def test_page_is_current():
    assert (ROOT / "docs" / "configuration.md").read_text() == schema_doc(), (
        "run: python -m dinov2_custom.configs.document > docs/configuration.md"
    )


def test_default_yaml_is_current():
    assert (ROOT / "dinov2_custom" / "configs" / "ssl_default_config.yaml").read_text() == schema_yaml(), (
        "run: python -m dinov2_custom.configs.document --yaml > dinov2_custom/configs/ssl_default_config.yaml"
    )


def test_default_yaml_equals_the_schema():
    assert yaml.safe_load(schema_yaml()) == default_values()


def test_page_has_every_key_once():
    page = schema_doc()
    assert [key for key in all_keys() if page.count(f"`{key}`") != 1 and key != "train.output_dir"] == []
