"""Describe one configuration key: its type, default, limits and what it does.

Not the keys themselves (schema.py) and not the loading (load.py). Read `option` first, then `list_options`.
"""

import dataclasses
import types
import typing
from typing import Any


@dataclasses.dataclass(frozen=True)
class Option:
    """One leaf of the schema. `key` is dotted, `types` the alternatives of its annotation."""

    key: str
    types: tuple[Any, ...]
    default: Any
    help: str
    unit: str
    changes_results: bool
    choices: tuple[str, ...]
    within: str
    length: int | None
    increasing: bool
    share: bool
    unused: bool


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    changes_results: bool = True,
    choices: tuple[str, ...] = (),
    within: str = "",
    length: int | None = None,
    increasing: bool = False,
    share: bool = False,
    unused: bool = False,
) -> Any:
    """Make a dataclass field that carries the description of a key.

    Args:
        unit: unit of the value, empty for a plain number or a name.
        changes_results: whether another value may change the trained weights.
        choices: the legal texts, if the key is a name.
        within: legal interval of each number, such as "[0, 1)" or "(0, inf)".
        length: number of elements of a list.
        increasing: whether a list must be in non-decreasing order.
        share: whether a text such as "10%", a share of the run, is legal too.
        unused: upstream's key that nothing reads; it is accepted and said to be unused.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "changes_results": changes_results,
        "choices": choices,
        "within": within,
        "length": length,
        "increasing": increasing,
        "share": share,
        "unused": unused,
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(default_factory: Any, help: str = "") -> Any:
    """Make a dataclass field that holds a nested section."""
    return dataclasses.field(default_factory=default_factory, metadata={"help": help})


def list_options(config: Any, prefix: str = "") -> dict[str, Option]:
    """Return every leaf of a config dataclass instance by dotted key, in the order of declaration."""
    hints = typing.get_type_hints(type(config))
    found: dict[str, Option] = {}
    for field in dataclasses.fields(config):
        key, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found.update(list_options(value, key + "."))
        else:
            found[key] = Option(key, _alternatives(hints[field.name]), value, **field.metadata)
    return found


def section_help(config: Any) -> dict[str, str]:
    """Return the one-line description of each top-level section."""
    return {field.name: field.metadata["help"] for field in dataclasses.fields(config)}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)
