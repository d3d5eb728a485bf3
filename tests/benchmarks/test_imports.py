"""Every benchmark finds what it imports from the package: benchmarks are not run by the tests."""

import importlib
from pathlib import Path

import pytest

NAMES = sorted(file.stem for file in Path(__file__).parents[2].glob("benchmarks/*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")
