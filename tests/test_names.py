"""Upstream's importable names (``tests/contracts/names.txt``): each exists, is ours, and accepts upstream's calls."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import operator
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2_custom._dinov2 import _ELSEWHERE
from tests.contracts import names
from tests.oracle import OracleUnavailable, ensure_oracle
from tests.test_alias import site  # noqa: F401 - a fixture

ENTRIES = names.contract()
LEFT_OUT = {
    tuple(line.partition(":")[0].split(" "))
    for line in names.CONTRACT.with_name("names_left_out.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
ALL_SAME = """
import importlib, operator, sys
from dinov2_custom._dinov2 import _ELSEWHERE as elsewhere
for line in sys.stdin.read().splitlines():
    module, name = line.split(" ")
    alias = importlib.import_module(("dinov2." + module).rstrip("."))
    real = importlib.import_module(("dinov2_custom." + elsewhere.get(module, module)).rstrip("."))
    assert alias is real, module
    assert operator.attrgetter(name)(alias) is not None, line
    exec(f"from {('dinov2.' + module).rstrip('.')} import {name.split('.')[0]}")
"""


def _problem(entry) -> str:
    """Return what is wrong with the object of ``entry`` here, or ""."""
    module = importlib.import_module(f"dinov2_custom.{_ELSEWHERE.get(entry.module, entry.module)}".rstrip("."))
    try:
        found = operator.attrgetter(entry.name)(module)
    except AttributeError as e:
        return str(e)
    if entry.value is not None and (value := names.of_value(getattr(found, "value", found))) != entry.value:
        return f"value {value} instead of {entry.value}"
    if entry.parameters is not None:
        got = names.of_callable(found, is_method=inspect.isfunction(found) and "." in entry.name)
        return ", ".join(names.lacks(entry.parameters, got))
    return ""


def test_every_name_exists_with_upstreams_value_and_parameters():
    found = {f"{entry.module}:{entry.name}": _problem(entry) for entry in ENTRIES}
    assert {name: problem for name, problem in found.items() if problem} == {}


def test_a_missing_name_is_a_problem():
    assert _problem(ENTRIES[0]._replace(name="absent")) and not _problem(ENTRIES[0])


def test_all_names_through_the_alias(site):  # noqa: F811
    lines = "\n".join(f"{entry.module} {entry.name}" for entry in ENTRIES)
    command = [sys.executable, "-B", "-c", ALL_SAME]
    environment = {"PYTHONPATH": str(site)}
    done = subprocess.run(command, input=lines, cwd=site, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr


# against upstream's source, parsed but not run


@pytest.fixture(scope="module")
def upstream():
    """Return ``{(module, name): parameters or None}`` of everything public that upstream's modules define."""
    try:
        root = ensure_oracle() / "dinov2"
    except OracleUnavailable as e:
        pytest.skip(str(e))
    found = {}
    for file in sorted(root.rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found |= {(module, name): parameters for name, parameters in _defined(ast.parse(file.read_text()))}
    return found


def _defined(tree):
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for name in constants:
        if not name.startswith("_") and name != "logger":
            yield name, None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, tuple(names.declared(node.args, constants))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _members(node, constants)


def _members(node, constants):
    methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
    own = methods.pop("__init__", None)
    yield node.name, tuple(names.declared(own.args, constants))[1:] if own else None
    for method in methods.values():
        is_property = any(ast.unparse(decorator) == "property" for decorator in method.decorator_list)
        if not method.name.startswith("_") or method.name == "__call__":
            parameters = None if is_property else tuple(names.declared(method.args, constants))[1:]
            yield f"{node.name}.{method.name}", parameters
    for assignment in node.body:
        if isinstance(assignment, ast.Assign):
            yield f"{node.name}.{assignment.targets[0].id}", None


def test_contract_is_upstreams(upstream):
    """Names marked HEAD, of 7764ea0, may accept more than in f896929; all others are identical."""
    wrong = []
    for entry in ENTRIES:
        theirs = upstream.get((entry.module, entry.name))
        if theirs is None or entry.parameters is None or entry.note == "spec":
            continue
        same = names.lacks(theirs, entry.parameters) == []
        if entry.note != "HEAD":
            same = same and names.lacks(entry.parameters, theirs) == []
        if not same:
            wrong.append(f"{entry.module}:{entry.name}: {theirs}")
    assert wrong == []


def test_every_name_of_upstream_is_covered_or_left_out_for_a_reason(upstream):
    covered = {(entry.module, entry.name) for entry in ENTRIES} | LEFT_OUT
    missing = [key for key in upstream if key not in covered and (key[0], key[1].partition(".")[0]) not in LEFT_OUT]
    assert missing == []
    assert {key for key in LEFT_OUT if key not in upstream} == set()


@pytest.mark.parametrize(
    ("wanted", "got", "problem"),
    [
        ("f(a, b=1)", "f(a, b=1, c=2)", None),
        ("f(a, b=1)", "f(b, a=1)", "a is not positional parameter 0"),
        ("f(a, b=1)", "f(a, b=2)", "b=2 instead of 1"),
        ("f(a, b=1)", "f(a, *, b=1)", "b is not positional parameter 1"),
        ("f(a)", "f(a, c)", "needs c"),
        ("f(a, **kwargs)", "f(a)", "no **kwargs"),
        ("f(*, n=(1, 5))", "f(*, n=[1, 5])", None),
        ("f(x, /)", "f(y)", None),
        ("f(x, y, /)", "f(y)", "no positional parameter 1"),
    ],
)
def test_comparison_sees(wanted, got, problem, tmp_path):
    (tmp_path / "names.txt").write_text(f"[m]\n{wanted}\n{got}\n")
    first, second = names.contract(tmp_path / "names.txt")
    problems = names.lacks(first.parameters, second.parameters)
    assert problem in problems if problem else problems == []


def test_the_file_is_where_it_says():
    assert Path(names.CONTRACT).is_file() and len(ENTRIES) > 200
