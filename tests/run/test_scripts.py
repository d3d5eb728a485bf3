"""The scripts in run/ in an interpreter that lacks their dependencies."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "run").rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interpreter_without_the_package_is_named_in_one_sentence(script):
    bare = [sys.executable, "-I", "-S", script]  # nothing but Python's own library
    done = subprocess.run(bare, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    said = f"error: no dinov2_custom in {sys.executable}: activate another or `pip install -c constraints.txt -e .`"
    assert done.stderr == f"{said}\n"
