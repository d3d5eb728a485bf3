"""Offer upstream's names for loading the YAML files of this package.

Not the loading of a run (load.py: `load_run_config`, which checks what it reads). Read `load_and_merge_config` first.
Source: upstream dinov2/configs/__init__.py (names and behaviour).
"""

import difflib

from omegaconf import DictConfig, OmegaConf

from dinov2_custom.configs.schema import all_options, default_values
from dinov2_custom.configs.sources import PACKAGE_DIR
from dinov2_custom.errors import ConfigError

_LACKING = object()


def default_config() -> DictConfig:
    """Return the defaults of all keys, editable."""
    return OmegaConf.create(default_values())


def with_defaults(cfg: DictConfig) -> DictConfig:
    """Return ``cfg`` with the defaults of the keys that it lacks, as upstream's YAML file does; itself if complete."""
    if all(OmegaConf.select(cfg, key, default=_LACKING) is not _LACKING for key in all_options()):
        return cfg
    return OmegaConf.merge(default_config(), cfg)


def load_config(config_name: str) -> DictConfig:
    """Load a YAML file of this package by its name without .yaml, such as "eval/vits14_pretrain".

    Raises:
        ConfigError: there is no such file; the text lists those that exist.
    """
    path = PACKAGE_DIR / f"{config_name}.yaml"
    if not path.is_file():
        names = sorted(file.relative_to(PACKAGE_DIR).with_suffix("").as_posix() for file in PACKAGE_DIR.rglob("*.yaml"))
        near = difflib.get_close_matches(config_name, names, n=1, cutoff=0.6)
        advice = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"load_config: expected the name of a packaged config, got {config_name!r} -> "
            f"{advice}there is: {', '.join(names)}"
        )
    return OmegaConf.load(path)


def load_and_merge_config(config_name: str) -> DictConfig:
    """Return the defaults overridden by a YAML file of this package, editable and unchecked."""
    return OmegaConf.merge(default_config(), load_config(config_name))
