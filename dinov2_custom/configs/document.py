"""Write the reference page and the default YAML file from the schema.

`python -m dinov2_custom.configs.document > docs/configuration.md` writes the page, with `--yaml` it writes
ssl_default_config.yaml, upstream's file of the defaults.
"""

import json
import sys

from dinov2_custom.configs.load import default_config, to_yaml
from dinov2_custom.configs.schema import Config, all_keys, expected

_INTRO = """# Configuration

<!-- Generated: python -m dinov2_custom.configs.document > docs/configuration.md -->

A run is described by the keys below. Values are taken, in increasing precedence, from the defaults, the file given with
`--config-file`, and the `key=value` overrides on the command line. `--output-dir` takes precedence over
`train.output_dir`.

```
python run/train/train.py --config-file configs/vits.yaml --output-dir out train.dataset_path=/my/images optim.epochs=20
```

* The value of an override is read as YAML: `true`, `1e-3`, `[0.1,0.5]`, `null`. Strings such as paths need no quotes,
  unless YAML would read them as something else (`[...]`, `null`).
* `${train.seed}` refers to another key and `${oc.env:NAME}` to an environment variable.
* A whole section can be given at once: `optim={epochs: 20, base_lr: 5e-4}`.

Every mistake in a configuration is reported at once, before any work: unknown keys with the nearest known ones, wrong
types, illegal values and values that do not go together. `--allow-unknown-keys` keeps unknown keys, unused, with a
warning. The complete configuration of a run is written to `config.yaml` in its output directory and can be given to
`--config-file` again.

The column "changes results" says whether another value may change the trained weights. Keys of upstream that have no
effect are accepted and marked as unused.
"""

_YAML_INTRO = """# Defaults of every key: the start of every run, and a place to look them up.
# Generated: python -m dinov2_custom.configs.document --yaml > dinov2_custom/configs/ssl_default_config.yaml
# Meaning, unit and limits of each key: docs/configuration.md
"""


def schema_doc() -> str:
    """Return docs/configuration.md: a table of every key with default, legal values, unit and meaning."""
    lines = [_INTRO]
    for name, section in Config.model_fields.items():
        lines += [f"## {name}", "", section.annotation.__doc__, ""]
        lines += ["| key | default | legal | unit | changes results | meaning |", "|---|---|---|---|---|---|"]
        keys_of: dict[tuple[str, str], list[str]] = {}  # keys that differ in nothing but the section share a row
        for key in all_keys():
            if key.startswith(name + "."):
                keys_of.setdefault((key.rsplit(".", 1)[-1], _cells(key)), []).append(f"`{key}`")
        lines += [f"| {'<br>'.join(keys)} | {cells} |" for (_, cells), keys in keys_of.items()]
        lines.append("")
    return "\n".join(lines)


def schema_yaml() -> str:
    """Return ssl_default_config.yaml: every key with its default."""
    return _YAML_INTRO + to_yaml(default_config())


def _cells(key: str) -> str:
    field = all_keys()[key]
    about = field.json_schema_extra
    default = field.default or "''" if isinstance(field.default, str) else json.dumps(field.default)
    legal = expected(key).replace("|", "\\|")
    changes = "yes" if about["changes_results"] else "no"
    return f"`{default}` | {legal} | {about['unit']} | {changes} | {field.description}"


if __name__ == "__main__":
    sys.stdout.write(schema_yaml() if "--yaml" in sys.argv[1:] else schema_doc())
