"""Fixtures ``upstream_data`` and ``upstream_source``: upstream's data code, run or only parsed, or a skip."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.oracle import OracleUnavailable, ensure_oracle


@pytest.fixture(scope="session")
def upstream_folder() -> Path:
    try:
        return ensure_oracle() / "dinov2" / "data"
    except OracleUnavailable as e:
        message = f"NOT COMPARED WITH UPSTREAM: its package cannot be had: {e}"
        if os.environ.get("DINOV2_REQUIRE_ORACLE") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


@pytest.fixture(scope="session")
def upstream_data(upstream_folder) -> Callable[[str], ModuleType]:
    """Return a function that loads upstream's ``data/<name>.py``, which must depend only on torch and numpy."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"upstream_{name}", upstream_folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def upstream_source(upstream_folder) -> Callable[[str, str], list[str]]:
    """Return a function that returns the parameter names of a function or class in upstream's ``data/<file>.py``."""

    def parameters(file: str, name: str) -> list[str]:
        tree = ast.parse((upstream_folder / f"{file}.py").read_text())
        node = next(n for n in tree.body if getattr(n, "name", None) == name)
        if isinstance(node, ast.ClassDef):
            node = next(n for n in node.body if getattr(n, "name", None) == "__init__")
        return [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]

    return parameters
