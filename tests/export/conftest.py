"""The ``timm`` fixture: the real library, fetched without its dependencies, or a skip with the reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.export.no_torchvision import empty_torchvision
from tests.oracle import package_or_skip

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def timm():
    pytest.importorskip("huggingface_hub", reason="NO TIMM CHECK: the extra 'export' is not installed")
    folder = package_or_skip("timm", Path(__file__).with_name("timm_requirements.txt"))
    sys.path.insert(0, str(folder))
    try:
        with empty_torchvision():
            import timm
    finally:
        sys.path.remove(str(folder))
    yield timm
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]
