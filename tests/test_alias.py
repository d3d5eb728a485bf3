"""``import dinov2.x`` is ``dinov2_custom.x``: in a fresh process, with the alias folder installed under its name."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

SAME_OBJECTS = """
import sys, types
import dinov2.utils.schedules
import dinov2.utils.schedules as alias
from dinov2.utils.rng import seed_for
from dinov2 import errors
import dinov2_custom.utils.rng as rng
import dinov2_custom.utils.schedules as real
import dinov2, dinov2_custom
assert dinov2 is dinov2_custom and dinov2.__version__ == dinov2_custom.__version__
assert alias is real and dinov2.utils.schedules is real
assert seed_for is rng.seed_for
assert errors is sys.modules["dinov2_custom.errors"]
assert real.__name__ == real.__spec__.name == "dinov2_custom.utils.schedules"
assert dinov2.utils.__spec__.name == "dinov2_custom.utils" and dinov2.utils.__path__
assert real.CosineScheduler.__module__ == "dinov2_custom.utils.schedules"
import importlib
importlib.reload(real)
import dinov2.configs
try:
    import dinov2.no_such_module
except ModuleNotFoundError as e:
    assert e.name == "dinov2.no_such_module"
else:
    raise AssertionError("found a module that does not exist")
for name, module in list(sys.modules.items()):
    if name.startswith("dinov2."):
        assert module is sys.modules[name.replace("dinov2", "dinov2_custom", 1)], name
"""


@pytest.fixture
def site(tmp_path):
    return fill_site(tmp_path)


def fill_site(folder):
    """Fill ``folder`` as pip does: the alias under its name, the package beside it."""
    shutil.copytree(REPOSITORY / "dinov2_custom" / "_dinov2", folder / "dinov2", ignore=shutil.ignore_patterns("__py*"))
    (folder / "dinov2_custom").symlink_to(REPOSITORY / "dinov2_custom")
    return folder


def _run(site, *arguments):
    command = [sys.executable, "-B", *arguments]
    return subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=600, env={"PYTHONPATH": str(site)})


@pytest.mark.parametrize(
    "first", ["", "import dinov2_custom.utils.schedules\n"], ids=["alias first", "real name first"]
)
def test_modules_are_the_same_objects(site, first):
    done = _run(site, "-c", first + SAME_OBJECTS)
    assert done.returncode == 0, done.stderr


def test_alias_can_be_run_as_a_module(site):
    done = _run(site, "-m", "dinov2.configs.document", "--yaml")
    assert done.returncode == 0, done.stderr
    assert "OFFICIAL_EPOCH_LENGTH: 1250" in done.stdout


def test_under_its_own_name_it_does_nothing():
    path = REPOSITORY / "dinov2_custom" / "_dinov2" / "__init__.py"
    before = list(sys.meta_path), sys.modules.get("dinov2")
    spec = importlib.util.spec_from_file_location("dinov2_custom._dinov2", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert (list(sys.meta_path), sys.modules.get("dinov2")) == before
