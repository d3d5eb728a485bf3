"""Load the configuration of a run: defaults < YAML file < overrides, checked, computed, read-only.

Upstream's loaders of its own YAML files, which check nothing, are at the end (source: upstream
dinov2/configs/__init__.py, names and behaviour). The keys are in schema.py.
"""

import contextlib
import difflib
import logging
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from dinov2_custom.configs.checks import (
    Mistakes,
    check_combinations,
    explain_bad_override,
    list_notes,
    of_fork,
    split_global_batch,
    suggest_key,
)
from dinov2_custom.configs.paths import resolve_output_dir, with_absolute_paths
from dinov2_custom.configs.schema import (
    Config,
    Section,
    all_keys,
    choices,
    default_values,
    expected,
    kinds,
    section_keys,
)
from dinov2_custom.errors import ConfigError, list_of_keys

UNREADABLE = (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException)
PACKAGE_DIR = Path(__file__).parent
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_YAML_TEXT = re.compile(r"\s*('.*'|\".*\"|\[.*\]|null|~)\s*", re.DOTALL)
_MAPPING = re.compile(r"\s*\{\s*[\w'\"]+\s*:.*\}\s*", re.DOTALL)
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_VARIABLE = re.compile(r"\$\{oc\.env:\s*([^,}\s]+)\s*\}")  # without a default
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """A value given by the user: dotted key, parsed YAML value, and its location."""

    key: str
    value: Any
    where: str


def load_run_config(
    config_file: str | None,
    overrides: Iterable[str] = (),
    output_dir: str | None = None,
    allow_unknown_keys: bool = False,
    *,
    require_dataset: bool = True,
    training: bool = True,
    world_size: int = 1,
    warn: Callable[[str], None] | None = None,
) -> DictConfig:
    """Return the complete, checked, read-only configuration of a run.

    Args:
        config_file: YAML file, or the name of a recipe such as "vits.yaml"; None or "" for the defaults only.
        overrides: strings `key.sub=value`; later ones take precedence.
        output_dir: overrides `train.output_dir`; the result's `train.output_dir` is absolute and is not created.
        allow_unknown_keys: keep unknown keys and warn about them instead of raising an error.
        require_dataset: whether an empty `train.dataset_path` is a mistake.
        training: whether to reject settings that cannot be trained, and to warn about training settings with an
            unexpected effect.
        world_size: processes of the run, for `optim.lr` and `optim.global_batch`.
        warn: called with each warning; default: this module's logger.

    Raises:
        ConfigError: if there are mistakes; lists all of them.
    """
    mistakes = Mistakes()
    from_file = read_file(config_file, mistakes)
    settings = (from_file or []) + read_overrides(overrides, mistakes)
    given = {setting.key: setting for setting in settings if setting.key in all_keys()}
    unknown = [setting for setting in settings if setting.key not in all_keys()]
    notes = _check_unknown(unknown, allow_unknown_keys, mistakes)
    unresolved = _from_environment(given, unknown)
    # environment variables of a finished run may no longer be set when only its model is loaded
    gone = set() if training else {key for key, value in unresolved.items() if _names_unset(value)}
    needed = {key: setting for key, setting in given.items() if key not in gone}
    values = validated(_resolve(needed, unknown, mistakes), given, mistakes)

    def where(key: str) -> str:
        return given[key].where if key in given else "default"

    if from_file is not None:
        check_combinations(values, where, mistakes, training=training)
        split_global_batch(values, where, world_size, mistakes)
        if require_dataset and not values["train.dataset_path"] and "train.dataset_path" not in mistakes.keys:
            fix = "add train.dataset_path=/path/to/images to the command, or set it in the config file"
            mistakes.add(f"train.dataset_path ({where('train.dataset_path')})", "a folder of images", "nothing", fix)
    mistakes.raise_if_any()

    given_lr, values["optim.lr"] = values["optim.lr"], scaled_lr(values, world_size)
    values["train.output_dir"] = resolve_output_dir(output_dir, values["train.output_dir"])
    values = with_absolute_paths(values) | unresolved
    from_a_run = where("optim.lr") != "override" and _is_scaled_lr(given_lr, values)
    if given_lr != 0 and not from_a_run and training:
        computed = values["optim.lr"]
        notes.append(f"optim.lr = {given_lr:g} is ignored: it is computed from optim.base_lr as {computed:g}")
    if training:
        notes += list_notes(values, {key for key in given if values[key] != all_keys()[key].default})
    for note in notes:
        (warn or _logger.warning)(note)
    cfg = OmegaConf.create(nested(values | {setting.key: setting.value for setting in unknown}))
    OmegaConf.set_struct(cfg, True)
    OmegaConf.set_readonly(cfg, True)
    return cfg


def scaled_lr(values: dict[str, Any], world_size: int) -> float:
    """Return the peak learning rate: base_lr * sqrt(global batch / 1024), including gradient accumulation.

    Source: upstream utils/config.py, rule sqrt_wrt_1024.
    """
    batch = values["train.batch_size_per_gpu"] * world_size * values.get("optim.accumulation_steps", 1)
    return values["optim.base_lr"] * math.sqrt(batch / 1024.0)


def _is_scaled_lr(lr: float, values: dict[str, Any]) -> bool:
    """Return whether `lr` matches the rule for some number of processes, as in the config.yaml of a run."""
    one_process = scaled_lr(values, 1)
    processes = (lr / one_process) ** 2 if one_process else 0.0
    return processes > 0.5 and math.isclose(processes, round(processes), rel_tol=1e-9)


# ---- reading


def to_yaml(cfg: DictConfig) -> str:
    """Return ``cfg`` as YAML that can be encoded as UTF-8, even if it contains paths that are not UTF-8."""
    try:
        return OmegaConf.to_yaml(cfg)
    except UnicodeEncodeError:  # libyaml does not write surrogates, which represent the bytes of such a path
        return yaml.dump(OmegaConf.to_container(cfg), Dumper=yaml.SafeDumper, sort_keys=False)


def read_yaml(path: Path) -> DictConfig | ListConfig:
    """Read a YAML file, including escaped surrogates, which :func:`to_yaml` writes and libyaml rejects."""
    text = path.read_text(encoding="utf-8")
    if "\\uDC" in text:
        return OmegaConf.create(yaml.load(text, Loader=yaml.SafeLoader))
    return OmegaConf.load(path)


def read_config(path: Path, advice: str) -> dict[str, Any]:
    """Read the configuration of an earlier run without resolving its interpolations.

    Raises:
        ConfigError: if the file exists but cannot be read or has no sections; the message ends with ``advice``.
    """
    try:
        content = OmegaConf.to_container(read_yaml(path), resolve=False)
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"expected a run's configuration in {path}, cannot read it ({reason}); {advice}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"expected a run's configuration in {path}, got no sections with keys; {advice}")
    return content


def parse_yaml(text: str) -> Any:
    """Parse text as a YAML value, with omegaconf's number syntax (1e-3 is a number)."""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]


def read_file(path: str | None, mistakes: Mistakes) -> list[Setting] | None:
    """Read a YAML config file (None and "" mean no file). Return None if it cannot be read."""
    if not path:
        return []
    file = find_config(path)
    try:
        content = OmegaConf.to_container(read_yaml(file), resolve=False)
    except FileNotFoundError:
        mistakes.add(f"--config-file {path}", "an existing YAML file", "no such file", _nearest_files(file))
        return None
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        mistakes.add(f"--config-file {path}", "a readable YAML file", reason, "fix the file at that place")
        return None
    if not isinstance(content, dict):
        mistakes.add(f"--config-file {path}", "sections with keys", "a list", "start with a section such as train:")
        return None
    return _flatten(content, "", path, mistakes)


def recipe_folder() -> Path:
    """Return the folder of the recipes: ``configs/`` of the checkout, which an installation has as ``recipes/``."""
    package = PACKAGE_DIR.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(path: str | os.PathLike) -> Path:
    """Return the file that ``--config-file path`` names: ``path``, or else the recipe of that name, if it exists."""
    file = Path(path).expanduser()
    recipe = recipe_folder() / file
    return recipe if not file.exists() and recipe.is_file() else file


def read_overrides(overrides: Iterable[str], mistakes: Mistakes, root: type[Section] = Config) -> list[Setting]:
    """Parse `key.sub=value` strings; values are YAML, except that text keys take them verbatim."""
    settings: list[Setting] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not _KEY.fullmatch(key):
            mistakes.add("override", "key=value", repr(override), explain_bad_override(override, root))
            continue
        try:
            value = text if _is_plain_text(key, text, root) else parse_yaml(text)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            reason = " ".join(str(error).split())
            mistakes.add(f"{key} (override)", "a YAML value", f"{text!r}", f"fix it: {reason}", key=key)
            continue
        settings += _flatten({key: value}, "", "override", mistakes, root)
    return settings


def _is_plain_text(key: str, text: str, root: type[Section]) -> bool:
    """Return whether an override's value is plain text with YAML's special characters instead of YAML."""
    if key not in all_keys(root) or "string" not in kinds(key, root) or _YAML_TEXT.fullmatch(text):
        return False
    return "object" not in kinds(key, root) or not _MAPPING.fullmatch(text)


def _flatten(
    content: dict[Any, Any], prefix: str, where: str, mistakes: Mistakes, root: type[Section] = Config
) -> list[Setting]:
    """Return the leaves of nested sections; anything that is not a section of the schema is kept whole."""
    sections = section_keys(root)
    settings: list[Setting] = []
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key not in sections:
            settings.append(Setting(key, value, where))
        elif isinstance(value, dict):
            settings += _flatten(value, key + ".", where, mistakes, root)
        elif value is not None:
            mistakes.add(f"{key} ({where})", f"a section with keys {', '.join(sections[key])}", repr(value))
    return settings


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` for ``{"a.b": 1}``."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[leaf] = value
    return tree


def _nearest_files(missing: Path) -> str:
    """List config files with names similar to the missing one, then all files in configs/."""
    own = sorted(PACKAGE_DIR.rglob("*.yaml"))
    found: dict[Path, str] = {}
    for folder in (missing.parent, Path("configs")):
        for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else []:
            found.setdefault(path.resolve(), str(path))
    recipes = recipe_folder()
    for path in sorted(recipes.rglob("*.yaml")):
        if path.parent.name != "cluster":  # flags of the launcher
            found.setdefault(path.resolve(), str(path.relative_to(recipes)))
    listed = list(found.values())
    found.update({path.resolve(): str(path) for path in own})
    stems = {Path(name).stem: name for name in reversed(found.values())}
    near = [stems[stem] for stem in difflib.get_close_matches(missing.stem, stems, n=3, cutoff=0.6)]
    advice = f"did you mean {' or '.join(near)}? " if near else ""
    return advice + (f"there is: {', '.join(listed)}" if listed else f"examples are in {PACKAGE_DIR}")


# ---- values


def report_unknown(unknown: Iterable[Setting], mistakes: Mistakes, root: type[Section], otherwise: str) -> None:
    """Report unknown keys as mistakes, each with similar ones, or with ``otherwise``."""
    for setting in unknown:
        fix = suggest_key(setting.key, root) or otherwise
        mistakes.add(f"{setting.key} ({setting.where})", "a known key", "an unknown one", fix)


def _check_unknown(unknown: list[Setting], allowed: bool, mistakes: Mistakes) -> list[str]:
    """Report unknown keys as mistakes, or return one warning that lists them."""
    kept = []
    for setting in unknown:
        parts = setting.key.split(".")
        parent = next((".".join(parts[:n]) for n in range(1, len(parts)) if ".".join(parts[:n]) in all_keys()), None)
        label = f"{setting.key} ({setting.where})"
        if parent:
            mistakes.add(label, f"{parent} to have no parts", "one", f"set {parent} itself")
        elif allowed:
            fork = of_fork(setting.key)
            inside = f" with {', '.join(map(str, setting.value))}" if isinstance(setting.value, dict) else ""
            kept.append(f"{label}{inside}" + (fork and f": {fork}"))
        else:
            report_unknown([setting], mistakes, Config, f"see {list_of_keys()}")
            mistakes.advice = "Unknown keys on purpose, of a fork say: --allow-unknown-keys keeps them, unused."
    return ["unknown keys, kept but not used:\n  " + "\n  ".join(kept)] if kept else []


def _resolve(given: dict[str, Setting], unknown: list[Setting], mistakes: Mistakes) -> dict[str, Any]:
    """Return the given values with `${...}` resolved; unresolvable ones are reported and omitted.

    The content of an environment variable is parsed as YAML, unless the key accepts any text.
    """
    tree: DictConfig | None = None
    resolved: dict[str, Any] = {}
    for key, setting in given.items():
        value = setting.value
        try:
            if "${" in repr(value):
                OmegaConf.create([value])
                tree = tree or _parsable([*given.values(), *unknown])
                value = OmegaConf.select(tree, key)
                if isinstance(value, str) and "string" not in kinds(key):
                    value = parse_yaml(value)
            resolved[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            mistakes.add(f"{key} ({setting.where})", expected(key), repr(setting.value), reason, key=key)
    return resolved


def _parsable(settings: Iterable[Setting]) -> DictConfig:
    """Return defaults and settings in one tree for resolving `${...}`, without the settings that cannot be parsed."""
    tree = OmegaConf.create(default_values())
    for setting in settings:
        with contextlib.suppress(OmegaConfBaseException):
            OmegaConf.update(tree, setting.key, setting.value, force_add=True)
    return tree


def validated(
    resolved: dict[str, Any], given: dict[str, Setting], mistakes: Mistakes, root: type[Section] = Config
) -> dict[str, Any]:
    """Return each key's value converted to its type; invalid values are reported and replaced by the default."""
    try:
        config = root.model_validate(nested(resolved))
    except ValidationError as error:
        places = [[str(part) for part in problem["loc"]] for problem in error.errors()]
        wrong = {".".join(place[:count]) for place in places for count in range(len(place) + 1)} & resolved.keys()
        for key in [key for key in resolved if key in wrong]:
            value = resolved.pop(key)
            fix = _hint(key, value, root)
            mistakes.add(f"{key} ({given[key].where})", expected(key, root), _show(value), fix, key=key)
        config = root.model_validate(nested(resolved))
    return {key: attrgetter(key)(config) for key in all_keys(root)}


def _from_environment(given: dict[str, Setting], unknown: list[Setting]) -> dict[str, Any]:
    """Return the values that refer to environment variables, unresolved.

    They may be secrets, and every file that a run writes contains its configuration. OmegaConf resolves them at access.
    """
    written = {setting.key: setting.value for setting in [*given.values(), *unknown]}

    def reads_environment(value: Any, seen: tuple[str, ...] = ()) -> bool:
        text = repr(value)
        referred = [key for key in _REFERENCE.findall(text) if key not in seen]
        return "${oc.env:" in text or any(
            reads_environment(inner, (*seen, key))
            for key in referred
            for name, inner in written.items()
            if key == name or key.startswith(f"{name}.")
        )

    return {
        key: setting.value
        for key, setting in given.items()
        if "string" in kinds(key) and key != "train.output_dir" and reads_environment(setting.value)
    }


def _names_unset(value: Any) -> bool:
    return any(name not in os.environ for name in _VARIABLE.findall(repr(value)))


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def _hint(key: str, value: Any, root: type[Section]) -> str:
    """Return how to fix a value of the wrong type or range."""
    if isinstance(value, str) and kinds(key, root) & {"integer", "number"} and _is_number(value):
        return "write the number without quotes"
    if "string" in kinds(key, root) and isinstance(value, (int, float)):
        return "put the text in quotes"
    near = difflib.get_close_matches(str(value), choices(key, root), n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    default = all_keys(root)[key].default
    return f"the default is {_show(default)}" if default != "" else ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ---- upstream's names


def default_config() -> DictConfig:
    """Return the defaults of all keys, editable."""
    return OmegaConf.create(default_values())


def with_defaults(cfg: DictConfig) -> DictConfig:
    """Return ``cfg`` with defaults for its missing keys, as upstream's YAML file does, or ``cfg`` if complete."""
    lacking = object()
    if all(OmegaConf.select(cfg, key, default=lacking) is not lacking for key in all_keys()):
        return cfg
    return OmegaConf.merge(default_config(), cfg)


def load_config(config_name: str) -> DictConfig:
    """Load a YAML file of this package by its name without .yaml, such as "eval/vits14_pretrain".

    Raises:
        ConfigError: if there is no such file; lists the existing files.
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
