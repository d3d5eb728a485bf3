"""A fresh copy of upstream's wheel for each test: ``checkout``; nothing without the wheel."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.oracle import OracleUnavailable, ensure_oracle


@pytest.fixture(scope="session")
def wheel():
    try:
        return ensure_oracle()
    except OracleUnavailable as e:
        message = f"NO PATCH CHECK: upstream's package (dinov2==0.0.1.dev2) cannot be had: {e}"
        if os.environ.get("DINOV2_REQUIRE_ORACLE") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


@pytest.fixture
def checkout(wheel, tmp_path):
    """A folder as after ``git clone``: the package ``dinov2``, unpatched."""
    folder = tmp_path / "checkout"
    shutil.copytree(wheel / "dinov2", folder / "dinov2", ignore=shutil.ignore_patterns("__pycache__"))
    return folder
