"""Contents of an installation: every package of the source tree, and the data files that code reads."""

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11; CI runs this there")
def test_every_package_is_listed():
    import tomllib

    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [p.parent for p in (REPOSITORY / "dinov2_custom").rglob("__init__.py")]
    source = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    assert set(listed) == source - {"dinov2_custom._dinov2"} | {"dinov2"}


def test_links_in_the_documents_lead_somewhere():
    import re

    broken = []
    for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "sky" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11; CI runs this there")
def test_every_data_file_is_listed():
    import tomllib

    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = REPOSITORY / "dinov2_custom"
    listed = {path for pattern in patterns["dinov2_custom"] for path in package.glob(pattern)}
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")}
    assert data and data == listed
