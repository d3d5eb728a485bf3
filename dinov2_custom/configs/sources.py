"""Read settings from a YAML file and from `key=value` overrides.

Not the types of the values (values.py). Read `read_file` and `read_overrides`; both return `Setting`s in order and
report what cannot be read to a `Mistakes`.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2_custom.configs.mistakes import Mistakes, explain_bad_override
from dinov2_custom.configs.schema import all_options
from dinov2_custom.configs.values import is_mapping, is_quoted_or_list, is_text
from dinov2_custom.errors import ConfigError

UNREADABLE = (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException)
PACKAGE_DIR = Path(__file__).parent
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


@dataclass(frozen=True)
class Setting:
    """A value given by the user: dotted key, value as YAML has it, and where it stands."""

    key: str
    value: Any
    where: str


def to_yaml(cfg: DictConfig) -> str:
    """Return ``cfg`` as YAML that can be written as UTF-8, also where paths are not UTF-8."""
    try:
        return OmegaConf.to_yaml(cfg)
    except UnicodeEncodeError:  # libyaml writes no surrogates, which stand for the bytes of such a path
        return yaml.dump(OmegaConf.to_container(cfg), Dumper=yaml.SafeDumper, sort_keys=False)


def read_yaml(path: Path) -> DictConfig | ListConfig:
    """Read a YAML file, also one with the escaped surrogates that :func:`to_yaml` writes and libyaml refuses."""
    text = path.read_text(encoding="utf-8")
    if "\\uDC" in text:
        return OmegaConf.create(yaml.load(text, Loader=yaml.SafeLoader))
    return OmegaConf.load(path)


def read_config(path: Path, advice: str) -> dict[str, Any]:
    """Read the configuration of an earlier run, without resolving what it refers to.

    Raises:
        ConfigError: a file that is there and cannot be read, or has no sections; ends with ``advice``.
    """
    try:
        content = OmegaConf.to_container(read_yaml(path), resolve=False)
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"expected a run's configuration in {path}, cannot read it ({reason}); {advice}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"expected a run's configuration in {path}, got no sections with keys; {advice}")
    return content


def read_file(path: str | None, mistakes: Mistakes) -> list[Setting] | None:
    """Read a YAML config file; None and "" are no file. Return None if it cannot be read."""
    if not path:
        return []
    file = Path(path).expanduser()
    try:
        content = OmegaConf.to_container(read_yaml(file), resolve=False)
    except FileNotFoundError:
        mistakes.add(f"--config-file {path}", "an existing YAML file", "no such file", _nearest_files(file))
        return None
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        mistakes.add(f"--config-file {path}", "a readable YAML file", reason, "mend the file at that place")
        return None
    if not isinstance(content, dict):
        mistakes.add(f"--config-file {path}", "sections with keys", "a list", "start with a section such as train:")
        return None
    return _flatten(content, "", path, mistakes)


def read_overrides(overrides: Iterable[str], mistakes: Mistakes) -> list[Setting]:
    """Read `key.sub=value` texts; a value is YAML, except that text keys take it as it stands."""
    settings: list[Setting] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not _KEY.fullmatch(key):
            mistakes.add("override", "key=value", repr(override), explain_bad_override(override))
            continue
        try:
            value = _parse(key, text)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            reason = " ".join(str(error).split())
            mistakes.add(f"{key} (override)", "a YAML value", f"{text!r}", f"mend it: {reason}", key=key)
            continue
        settings += _flatten({key: value}, "", "override", mistakes)
    return settings


def parse_yaml(text: str) -> Any:
    """Read a text as the value of a YAML key, with omegaconf's numbers (1e-3 is one)."""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]


def section_keys() -> dict[str, list[str]]:
    """Return the names directly inside each section, by dotted section name."""
    inside: dict[str, dict[str, None]] = {}
    for key in all_options():
        parts = key.split(".")
        for count in range(1, len(parts)):
            inside.setdefault(".".join(parts[:count]), {})[parts[count]] = None
    return {name: list(keys) for name, keys in inside.items()}


def _parse(key: str, text: str) -> Any:
    option = all_options().get(key)
    if option is not None and is_text(option) and not is_quoted_or_list(text) and not is_mapping(option, text):
        return text
    return parse_yaml(text)


def _flatten(content: dict[Any, Any], prefix: str, where: str, mistakes: Mistakes) -> list[Setting]:
    """List the leaves of nested sections; what is no section of the schema stays whole."""
    sections = section_keys()
    settings: list[Setting] = []
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key not in sections:
            settings.append(Setting(key, value, where))
        elif isinstance(value, dict):
            settings += _flatten(value, key + ".", where, mistakes)
        elif value is not None:
            mistakes.add(f"{key} ({where})", f"a section with keys {', '.join(sections[key])}", repr(value))
    return settings


def _nearest_files(missing: Path) -> str:
    """Name config files like the missing one, then all in configs/."""
    own = sorted(PACKAGE_DIR.rglob("*.yaml"))
    folders = [missing.parent, Path("configs"), PACKAGE_DIR.parent.parent / "configs"]
    found: dict[Path, str] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else []:
            found.setdefault(path.resolve(), str(path))
    listed = list(found.values())
    found.update({path.resolve(): str(path) for path in own})
    stems = {Path(name).stem: name for name in reversed(found.values())}
    near = [stems[stem] for stem in difflib.get_close_matches(missing.stem, stems, n=3, cutoff=0.6)]
    advice = f"did you mean {' or '.join(near)}? " if near else ""
    return advice + (f"there is: {', '.join(listed)}" if listed else f"examples are in {PACKAGE_DIR}")
