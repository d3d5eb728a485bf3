"""Turn one value from YAML into the type its key wants, or say what was expected.

Not the checks across keys (combinations.py). Read `coerce` first.
"""

import math
import re
import types
import typing
from typing import Any

from dinov2_custom.configs.option import Option

_INTERVAL = re.compile(r"([\[(])\s*(\S+)\s*,\s*(\S+)\s*([\])])")
_SHARE = re.compile(r"\d+(\.\d*)?%")
_QUOTES = "'\""
_MAPPING = re.compile(r"\{\s*[\w'\"]+\s*:.*\}", re.DOTALL)


def coerce(option: Option, value: Any) -> Any:
    """Return `value` as the key's type.

    Whole numbers pass as float, integral floats as int, null as the empty text, and true and false as on and off where
    these are choices. Nothing else is converted.

    Raises:
        ValueError: the value does not fit; the text is what was expected.
    """
    if value is None and type(None) in option.types:
        return None
    if value is None and is_text(option):
        return ""
    for kind in option.types:
        result = _fit(option, kind, value)
        if result is not None:
            return result
    raise ValueError(expected(option))


def expected(option: Option) -> str:
    """Describe the legal values of a key in a few words."""
    names = [_describe(option, kind) for kind in _distinct(option.types)]
    return " or ".join(name for name in names if name)


def is_text(option: Option) -> bool:
    """Tell whether an override's value for this key is taken as it stands, YAML's special characters included."""
    return str in option.types and not option.choices and not option.share


def is_quoted_or_list(text: str) -> bool:
    """Tell whether an override's value for a text key is YAML after all: quoted, a list, or null."""
    stripped = text.strip()
    quoted = len(stripped) >= 2 and stripped[0] in _QUOTES and stripped[-1] == stripped[0]
    return quoted or (stripped.startswith("[") and stripped.endswith("]")) or stripped in ("null", "~")


def is_mapping(option: Option, text: str) -> bool:
    """Tell whether an override's value for a text key that may be a mapping is one, `{path: /a, ...}`."""
    return dict in option.types and _MAPPING.fullmatch(text.strip()) is not None


def share_of_run(length: float | str, epochs: float) -> float:
    """Return what part of a run of ``epochs`` a length in epochs, or a share such as "10%", is."""
    return float(length.rstrip("%")) / 100 if isinstance(length, str) else length / epochs


def _fit(option: Option, kind: Any, value: Any) -> Any:
    """Return the value as `kind`, or None if it is not one. `None` itself is handled by the caller."""
    if typing.get_origin(kind) is list:
        return _fit_list(option, typing.get_args(kind)[0], value)
    if isinstance(kind, types.UnionType):
        fitted = (_fit(option, one, value) for one in typing.get_args(kind))
        return next((one for one in fitted if one is not None), None)
    if kind is dict:
        return value if isinstance(value, dict) and value and all(isinstance(key, str) for key in value) else None
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is str:
        if isinstance(value, bool) and "on" in option.choices:  # what YAML makes of a bare on or off
            return "on" if value else "off"
        legal = isinstance(value, str) and (not option.choices or value in option.choices)
        if option.share:
            legal = legal and _SHARE.fullmatch(value) is not None and float(value[:-1]) <= 100
        return value if legal else None
    if kind in (int, float):
        return _fit_number(option, kind, value)
    return None


def _fit_number(option: Option, kind: type, value: Any) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value) or not _inside(option.within, value):
        return None
    if kind is int:
        return int(value) if float(value).is_integer() else None
    return float(value)


def _fit_list(option: Option, element: type, value: Any) -> list | None:
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if option.length is not None and len(value) != option.length:
        return None
    fitted = [_fit(option, element, item) for item in value]
    if any(item is None for item in fitted) or (option.increasing and fitted != sorted(fitted)):
        return None
    return fitted


def _inside(within: str, value: float) -> bool:
    if not within:
        return True
    left, low, high, right = _INTERVAL.fullmatch(within).groups()
    above = value >= float(low) if left == "[" else value > float(low)
    below = value <= float(high) if right == "]" else value < float(high)
    return above and below


def _distinct(kinds: tuple[Any, ...]) -> list[Any]:
    """Drop int where float is also legal, which says it all."""
    return [kind for kind in kinds if not (kind is int and float in kinds)]


def _describe(option: Option, kind: Any) -> str:
    if kind is type(None):
        return "null"
    if kind is bool:
        return "true or false"
    if kind is str:
        if option.share:
            return "a share of the run such as 10%"
        return " | ".join(option.choices) if option.choices else "text"
    if kind is dict:
        return "a mapping"
    if typing.get_origin(kind) is list:
        return _describe_list(option, typing.get_args(kind)[0])
    return f"a {'whole ' if kind is int else ''}number{_describe_interval(option.within)}"


def _describe_list(option: Option, element: type) -> str:
    texts = {str: "texts", str | dict: "texts and mappings", str | int | float: "texts and numbers"}
    noun = texts.get(element) or f"numbers{_describe_interval(option.within)}"
    count = f"{option.length} " if option.length else ""
    order = ", smaller first" if option.increasing else ""
    return f"a list of {count}{noun}{order}"


def _describe_interval(within: str) -> str:
    if not within:
        return ""
    left, low, high, _ = _INTERVAL.fullmatch(within).groups()
    if high == "inf":
        return f" of at least {low}" if left == "[" else f" above {low}"
    return f" in {within}"
