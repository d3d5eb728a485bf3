"""The ``timm`` fixture: the real library, fetched without its dependencies, or a skip that says why."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.export.no_torchvision import empty_torchvision
from tests.oracle import OracleUnavailable, ensure_package

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def timm():
    pytest.importorskip("huggingface_hub", reason="NO TIMM CHECK: the extra 'export' is not installed")
    try:
        requirements = Path(__file__).with_name("timm_requirements.txt")
        folder = ensure_package(REPOSITORY / ".oracle_timm", Path("timm") / "__init__.py", requirements)
    except OracleUnavailable as e:
        if os.environ.get("DINOV2_REQUIRE_ORACLE") == "1":
            pytest.fail(f"NO TIMM CHECK: {e}", pytrace=False)
        pytest.skip(f"NO TIMM CHECK: {e}")
    sys.path.insert(0, str(folder))
    try:
        with empty_torchvision():
            import timm
    finally:
        sys.path.remove(str(folder))
    yield timm
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]
