"""Load the configuration of a run: defaults < YAML file < overrides, checked, computed, read-only.

Not the keys (schema.py) and not upstream's loader names (upstream.py). Read `load_run_config` first.
"""

import contextlib
import difflib
import logging
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2_custom.commands import list_of_keys
from dinov2_custom.configs.combinations import check_combinations, list_notes
from dinov2_custom.configs.global_batch import split_global_batch
from dinov2_custom.configs.mistakes import OF_FORKS, Mistakes, suggest_key
from dinov2_custom.configs.option import Option
from dinov2_custom.configs.paths import check_output_dir, resolve_output_dir, with_absolute_paths
from dinov2_custom.configs.schema import all_options
from dinov2_custom.configs.sources import Setting, parse_yaml, read_file, read_overrides
from dinov2_custom.configs.values import coerce, expected, is_text

__all__ = ["check_output_dir", "load_run_config", "resolve_output_dir", "scaled_lr"]

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_VARIABLE = re.compile(r"\$\{oc\.env:\s*([^,}\s]+)\s*\}")  # without a default
_logger = logging.getLogger(__name__)


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
        config_file: YAML file; None or "" for the defaults only.
        overrides: texts `key.sub=value`, the later one wins.
        output_dir: wins over `train.output_dir`; the result's `train.output_dir` is absolute and not created.
        allow_unknown_keys: keep unknown keys and warn about them, instead of refusing them.
        require_dataset: whether an empty `train.dataset_path` is a mistake.
        training: whether to refuse what cannot be trained, and to warn of settings of the training that work but do
            not do what one may think.
        world_size: processes of the run, for `optim.lr` and `optim.global_batch`.
        warn: called with each warning; default: this module's logger.

    Raises:
        ConfigError: lists every mistake at once.
    """
    options = all_options()
    mistakes = Mistakes()
    from_file = read_file(config_file, mistakes)
    settings = (from_file or []) + read_overrides(overrides, mistakes)
    given = {setting.key: setting for setting in settings if setting.key in options}
    unknown = [setting for setting in settings if setting.key not in options]
    notes = _check_unknown(unknown, options, allow_unknown_keys, mistakes)

    values = _read_values(given, unknown, options, mistakes, training)

    def where(key: str) -> str:
        return given[key].where if key in given else "default"

    if from_file is not None:
        check_combinations(values, where, mistakes, training=training)
        split_global_batch(values, where, world_size, mistakes)
        if require_dataset:
            _check_dataset(values["train.dataset_path"], where, mistakes)
    mistakes.raise_if_any()

    given_lr, values["optim.lr"] = values["optim.lr"], scaled_lr(values, world_size)
    values["train.output_dir"] = resolve_output_dir(output_dir, values["train.output_dir"])
    values = with_absolute_paths(values) | _unresolved(given, unknown, options)
    from_a_run = where("optim.lr") != "override" and _is_scaled_lr(given_lr, values)
    if given_lr != 0 and not from_a_run and training:
        computed = values["optim.lr"]
        notes.append(f"optim.lr = {given_lr:g} is ignored: it is computed from optim.base_lr as {computed:g}")
    if training:
        notes += list_notes(values, {key for key in given if values[key] != options[key].default})
    for note in notes:
        (warn or _logger.warning)(note)
    return _read_only(values, unknown)


def scaled_lr(values: dict[str, Any], world_size: int) -> float:
    """Return the peak learning rate: base_lr times the square root of global batch / 1024, accumulation included.

    Source: upstream utils/config.py, rule sqrt_wrt_1024.
    """
    batch = values["train.batch_size_per_gpu"] * world_size * values.get("optim.accumulation_steps", 1)
    return values["optim.base_lr"] * math.sqrt(batch / 1024.0)


def _is_scaled_lr(lr: float, values: dict[str, Any]) -> bool:
    """Tell whether `lr` follows from the rule for some number of processes, as in the config.yaml of a run."""
    one_process = scaled_lr(values, 1)
    processes = (lr / one_process) ** 2 if one_process else 0.0
    return processes > 0.5 and math.isclose(processes, round(processes), rel_tol=1e-9)


def _check_dataset(path: str | list[str], where: Callable[[str], str], mistakes: Mistakes) -> None:
    key = "train.dataset_path"
    if not path and key not in mistakes.keys:
        fix = f"add {key}=/path/to/images to the command, or set it in the config file"
        mistakes.add(f"{key} ({where(key)})", "a folder of images", "nothing", fix)


def _check_unknown(unknown: list[Setting], options: dict[str, Option], allowed: bool, mistakes: Mistakes) -> list[str]:
    """Report unknown keys as mistakes, or return one warning that lists them."""
    kept = []
    for setting in unknown:
        parts = setting.key.split(".")
        parent = next((".".join(parts[:n]) for n in range(1, len(parts)) if ".".join(parts[:n]) in options), None)
        label = f"{setting.key} ({setting.where})"
        if parent:
            mistakes.add(label, f"{parent} to have no parts", "one", f"set {parent} itself")
        elif allowed:
            inside = f" with {', '.join(map(str, setting.value))}" if isinstance(setting.value, dict) else ""
            kept.append(f"{label}{inside}" + (f": {OF_FORKS[setting.key]}" if setting.key in OF_FORKS else ""))
        else:
            fix = suggest_key(setting.key) or f"see {list_of_keys()}"
            mistakes.add(label, "a known key", "an unknown one", fix)
            mistakes.advice = "Unknown keys on purpose, of a fork say: --allow-unknown-keys keeps them, unused."
    return ["unknown keys, kept but not used:\n  " + "\n  ".join(kept)] if kept else []


def _read_values(
    given: dict[str, Setting], unknown: list[Setting], options: dict[str, Option], mistakes: Mistakes, training: bool
) -> dict[str, Any]:
    """Return the value of each key; a bad one is reported and stands as its default.

    What a finished run read from an environment variable may be gone when only its model is wanted.
    """
    if not training:
        gone = [key for key in _unresolved(given, unknown, options) if _names_unset(given[key].value)]
        given = {key: setting for key, setting in given.items() if key not in gone}
    values = {key: option.default for key, option in options.items()}
    raw = None
    for key, setting in given.items():
        value = setting.value
        try:
            if "${" in repr(value):
                OmegaConf.create([value])
                raw = raw or _parsable(values, [*given.values(), *unknown])
                value = _resolve(raw, options[key])
            values[key] = coerce(options[key], value)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            mistakes.add(f"{key} ({setting.where})", expected(options[key]), repr(setting.value), reason, key=key)
        except ValueError as error:
            mistakes.add(f"{key} ({setting.where})", str(error), _show(value), _hint(options[key], value), key=key)
    return values


def _unresolved(given: dict[str, Setting], unknown: list[Setting], options: dict[str, Option]) -> dict[str, Any]:
    """Return the texts that are read from environment variables, as they were given: they may be secrets, and every
    file that a run writes has its configuration. OmegaConf resolves them at each access.
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
        if is_text(options[key]) and key != "train.output_dir" and reads_environment(setting.value)
    }


def _names_unset(value: Any) -> bool:
    return any(name not in os.environ for name in _VARIABLE.findall(repr(value)))


def _parsable(values: dict[str, Any], settings: Iterable[Setting]) -> DictConfig:
    """Return defaults and settings in one tree, for `${...}` to look in, without the settings that cannot be parsed."""
    raw = OmegaConf.create(_nested(values))
    for setting in settings:
        with contextlib.suppress(OmegaConfBaseException):
            OmegaConf.update(raw, setting.key, setting.value, force_add=True)
    return raw


def _resolve(raw: DictConfig, option: Option) -> Any:
    """Return a key's value with its `${...}` replaced; what an environment variable holds is read as YAML."""
    value = OmegaConf.select(raw, option.key)
    if isinstance(value, str) and not is_text(option):
        value = parse_yaml(value)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def _hint(option: Option, value: Any) -> str:
    """Say what to do about a value of the wrong type or range."""
    takes_numbers = int in option.types or float in option.types
    if isinstance(value, str) and takes_numbers and _is_number(value):
        return "write the number without quotes"
    if is_text(option) and isinstance(value, (int, float)):
        return "put the text in quotes"
    near = difflib.get_close_matches(str(value), option.choices, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"the default is {_show(option.default)}" if option.default != "" else ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _as_values(settings: Iterable[Setting]) -> dict[str, Any]:
    return {setting.key: setting.value for setting in settings}


def _nested(values: dict[str, Any]) -> dict[str, Any]:
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


def _read_only(values: dict[str, Any], unknown: list[Setting]) -> DictConfig:
    cfg = OmegaConf.create(_nested({**values, **_as_values(unknown)}))
    OmegaConf.set_struct(cfg, True)
    OmegaConf.set_readonly(cfg, True)
    return cfg
