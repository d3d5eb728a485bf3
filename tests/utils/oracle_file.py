"""Load one file of upstream as a separate module, for functions without other dependencies. See ``tests/oracle``."""

import functools
import importlib.util
import os
from types import ModuleType

import pytest

from tests.oracle import OracleUnavailable, ensure_oracle


@functools.cache
def load_oracle_file(path: str) -> ModuleType:
    """Return ``dinov2/<path>`` of upstream; skip the test with the reason if upstream's package is unavailable."""
    try:
        file = ensure_oracle() / "dinov2" / path
    except OracleUnavailable as e:
        message = f"NO PARITY CHECK: upstream's package (dinov2==0.0.1.dev2) cannot be had: {e}"
        if os.environ.get("DINOV2_REQUIRE_ORACLE") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    spec = importlib.util.spec_from_file_location("oracle_" + path.replace("/", "_").removesuffix(".py"), file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
