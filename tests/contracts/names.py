"""The contract of upstream's importable names: how it is written, and what "ours takes every such call" means.

``names.txt`` has a ``[module]`` line a module, then ``name(parameters)``, ``Class(parameters of its constructor)``,
``Class.method(parameters without self)``, ``Class.attribute`` or ``NAME = value``. ``# HEAD`` marks what upstream has
at 7764ea0 and not yet at f896929, the revision of the oracle; ``# spec`` where upstream hides the parameters in
``*args``. Defaults are written by value; lists as tuples. Read :func:`lacks` first.
"""

from __future__ import annotations

import ast
import enum
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CONTRACT = Path(__file__).with_name("names.txt")


class Parameter(NamedTuple):
    """``kind`` is one of "place" (by place only), "positional", "keyword", "*", "**"; ``default`` None without one."""

    name: str
    kind: str
    default: str | None


class Entry(NamedTuple):
    """``parameters`` is None for what is not called; ``value`` None for what is not a constant."""

    module: str
    name: str
    parameters: tuple[Parameter, ...] | None
    value: str | None
    note: str


def contract(path: Path = CONTRACT) -> list[Entry]:
    """Read the file."""
    entries, module = [], ""
    for line in path.read_text().splitlines():
        text, _, comment = (part.strip() for part in line.partition("  #"))
        if text.startswith("["):
            module = text.strip("[]")
        elif text and not text.startswith("#"):
            entries.append(_entry(module, text, comment))
    return entries


def _entry(module: str, text: str, note: str) -> Entry:
    name, bracket, _ = text.partition("(")
    if " = " in name:
        name, _, value = text.partition(" = ")
        return Entry(module, name, None, written(ast.parse(value, mode="eval").body), note)
    if not bracket:
        return Entry(module, text, None, None, note)
    function = ast.parse(f"def f{text[len(name) :]}: ...").body[0]
    return Entry(module, name, tuple(declared(function.args)), None, note)


def declared(arguments: ast.arguments, constants: dict[str, ast.AST] | None = None) -> Iterator[Parameter]:
    """Yield the parameters of a ``def``; names of module constants in defaults are replaced by their values."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for argument, default in zip(positional, defaults, strict=True):
        kind = "place" if argument in arguments.posonlyargs else "positional"
        yield Parameter(argument.arg, kind, written(default, constants))
    if arguments.vararg:
        yield Parameter(arguments.vararg.arg, "*", None)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield Parameter(argument.arg, "keyword", written(default, constants))
    if arguments.kwarg:
        yield Parameter(arguments.kwarg.arg, "**", None)


def written(node: ast.AST | None, constants: dict[str, ast.AST] | None = None) -> str | None:
    """Return one text for each value, however its default is spelt; None for no node."""
    if node is None:
        return None
    if isinstance(node, ast.Name) and node.id in (constants or {}):
        return written(constants[node.id], constants)
    if isinstance(node, ast.Attribute | ast.Name):
        text = ast.unparse(node).rpartition(".")[2]
        return {"float": "float32", "DEBUG": "10"}.get(text, text).lower()
    if isinstance(node, ast.Call):  # set(), torch.device("cpu"), torch.linspace(-6, 5, 45)
        return (
            written(node.args[0], constants) if len(node.args) == 1 else _plain(tuple(map(ast.literal_eval, node.args)))
        )
    return _plain(ast.literal_eval(node))


def of_value(value: Any) -> str:
    """Return the same text for an object."""
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__name__.lower()
    if type(value).__module__ == "torch":  # a dtype or a device
        return str(value).removeprefix("torch.")
    return _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, list | set | tuple | frozenset):
        return repr(tuple(value))
    return value.lower() if isinstance(value, str) else repr(value)


def of_callable(function: Any, is_method: bool = False) -> tuple[Parameter, ...]:
    """Return the parameters of a function, class or (without self) method."""
    kinds = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
        inspect.Parameter.KEYWORD_ONLY: "keyword",
    }
    found = [
        Parameter(p.name, kinds.get(p.kind, "positional"), None if p.default is p.empty else of_value(p.default))
        for p in inspect.signature(function).parameters.values()
    ]
    return tuple(found[1:] if is_method else found)


def lacks(wanted: tuple[Parameter, ...], got: tuple[Parameter, ...]) -> list[str]:
    """Return why some call that fits ``wanted`` would fail or mean something else with ``got``."""
    problems = []
    by_name = {parameter.name: (place, parameter) for place, parameter in enumerate(got)}
    takes_any = {parameter.kind for parameter in got} & {"**"}
    for place, parameter in enumerate(wanted):
        if parameter.kind in ("*", "**"):
            if not any(other.kind == parameter.kind for other in got):
                problems.append(f"no {parameter.kind}{parameter.name}")
            continue
        if parameter.kind == "place":
            parameter = Parameter(got[place].name if place < len(got) else "", "positional", parameter.default)
            if not parameter.name:
                problems.append(f"no positional parameter {place}")
                continue
        if parameter.name not in by_name:
            problems += [] if takes_any and parameter.kind == "keyword" else [f"no parameter {parameter.name}"]
            continue
        own_place, own = by_name[parameter.name]
        if parameter.kind == "positional" and (own.kind not in ("positional", "place") or own_place != place):
            problems.append(f"{parameter.name} is not positional parameter {place}")
        if parameter.default is not None and own.default != parameter.default:
            problems.append(f"{parameter.name}={own.default} instead of {parameter.default}")
    names = {parameter.name for parameter in wanted}
    places = sum(parameter.kind == "place" for parameter in wanted)
    extra = [p.name for p in got[places:] if p.name not in names and p.default is None and p.kind[0] != "*"]
    return problems + [f"needs {name}" for name in extra]
