"""Write the reference page and the default YAML file from the schema.

Not the schema (schema.py). `python -m dinov2_custom.configs.document > docs/configuration.md` writes the page, with
`--yaml` it writes ssl_default_config.yaml. Read `schema_doc` first.
"""

import sys
from typing import Any

from dinov2_custom.configs.option import Option, section_help
from dinov2_custom.configs.schema import Config, all_options
from dinov2_custom.configs.values import expected

_INTRO = """# Configuration

<!-- Generated: python -m dinov2_custom.configs.document > docs/configuration.md -->

A run is described by the keys below. A value comes from, later ones winning: the default, the file given with
`--config-file`, the `key=value` overrides on the command line. `--output-dir` wins over `train.output_dir`.

```
python run/train/train.py --config-file configs/vits.yaml --output-dir out train.dataset_path=/my/images optim.epochs=20
```

The value of an override is read as YAML: `true`, `1e-3`, `[0.1,0.5]`, `null`. Texts such as paths are taken as they
stand; quote them to keep YAML from reading `[...]` or `null`. `${train.seed}` refers to another key and
`${oc.env:NAME}` to an environment variable. A whole section can be given at once: `optim={epochs: 20, base_lr: 5e-4}`.

Every mistake in a configuration is reported at once, before any work: unknown keys with the nearest known ones, wrong
types, illegal values and values that do not go together. `--allow-unknown-keys` keeps unknown keys, unused, with a
warning. The complete configuration of a run is written to `config.yaml` in its output directory and can be given to
`--config-file` again.

"changes results" says whether another value may change the trained weights. Keys of upstream that nothing reads are
accepted and said to be unused.
"""

_YAML_INTRO = """# Defaults of every key: the start of every run, and a place to look them up.
# Generated: python -m dinov2_custom.configs.document --yaml > dinov2_custom/configs/ssl_default_config.yaml
# Meaning, unit and limits of each key: docs/configuration.md
"""


def schema_doc() -> str:
    """Return docs/configuration.md: a table of every key with default, legal values, unit and meaning."""
    lines = [_INTRO]
    options = all_options()
    for name, meaning in section_help(Config()).items():
        lines += [f"## {name}", "", meaning, ""]
        lines += ["| key | default | legal | unit | changes results | meaning |", "|---|---|---|---|---|---|"]
        lines += _rows([option for key, option in options.items() if key.startswith(name + ".")])
        lines.append("")
    return "\n".join(lines)


def schema_yaml() -> str:
    """Return ssl_default_config.yaml: every key with its default."""
    lines = [_YAML_INTRO.rstrip("\n")]
    open_sections: list[str] = []
    for key, option in all_options().items():
        *sections, leaf = key.split(".")
        shared = 0
        while shared < len(sections) and sections[: shared + 1] == open_sections[: shared + 1]:
            shared += 1
        lines += [f"{'  ' * depth}{sections[depth]}:" for depth in range(shared, len(sections))]
        open_sections = sections
        lines.append(f"{'  ' * len(sections)}{leaf}: {_scalar(option.default)}")
    return "\n".join(lines) + "\n"


def _rows(options: list[Option]) -> list[str]:
    """Write the rows of a table; keys that differ in nothing but the section share one."""
    keys_of: dict[tuple[str, str], list[str]] = {}
    for option in options:
        leaf = option.key.rsplit(".", 1)[-1]
        keys_of.setdefault((leaf, _cells(option)), []).append(f"`{option.key}`")
    return [f"| {'<br>'.join(keys)} | {cells} |" for (_, cells), keys in keys_of.items()]


def _cells(option: Option) -> str:
    legal = expected(option).replace("|", "\\|")
    changes = "yes" if option.changes_results else "no"
    return f"`{_scalar(option.default)}` | {legal} | {option.unit} | {changes} | {option.help}"


def _scalar(value: Any) -> str:
    """Write a value as YAML 1.1 and 1.2 both read it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    if isinstance(value, float) and "." not in repr(value):
        return repr(value).replace("e", ".0e")
    return "''" if value == "" else str(value)


if __name__ == "__main__":
    sys.stdout.write(schema_yaml() if "--yaml" in sys.argv[1:] else schema_doc())
