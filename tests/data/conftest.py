"""``upstream_data``: a module of upstream's data code, loaded by file, or a skip that says why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.oracle import OracleUnavailable, ensure_oracle


@pytest.fixture(scope="session")
def upstream_data() -> Callable[[str], ModuleType]:
    """Return a function that loads ``.oracle/dinov2/data/<name>.py``, which must need nothing but torch and numpy."""
    try:
        folder = ensure_oracle()
    except OracleUnavailable as e:
        message = f"NOT COMPARED WITH UPSTREAM: its package cannot be had: {e}"
        if os.environ.get("DINOV2_REQUIRE_ORACLE") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"upstream_{name}", folder / "dinov2" / "data" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
