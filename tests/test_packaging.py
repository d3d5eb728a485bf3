"""Contents of an installation: every package of the source tree, and the data files that code reads."""

import json
import re
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
    assert set(listed) == source - {"dinov2_custom._dinov2"} | {"dinov2", "dinov2_custom.recipes"}  # recipes: configs/


def _anchors(page):
    """Return the anchors of a page's headings, as GitHub and mkdocs form them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {_anchor(title) for title in re.findall(r"^#+ (.*)", text, re.MULTILINE)}


def _anchor(title):
    return re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")


def test_links_in_the_documents_lead_somewhere():
    broken = []
    folders = [REPOSITORY / name for name in ("", "docs", "sky", "patches")]
    for page in [path for folder in folders for path in folder.glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
            place = page.parent / target if target else page
            if "://" not in target and not (place.exists() and (not anchor or anchor in _anchors(place))):
                broken.append(f"{page.name}: {target}#{anchor}")
    assert broken == []


def test_pages_that_the_code_names_exist():
    """Also their sections, written as "docs/page.md, Section" or "docs/page.md, 'Section'"."""
    named = []
    mention = re.compile(r"\b(docs/[\w-]+\.md)(?:, (?:'([^']+)'|([A-Z][\w ]+)))?")
    for folder in ("dinov2_custom", "configs", "run", "sky", "patches", "notebooks", "benchmarks"):
        files = [path for path in (REPOSITORY / folder).rglob("*") if path.suffix in (".py", ".yaml", ".ipynb", ".sh")]
        for path in files:
            for name, *section in mention.findall(path.read_text()):
                named.append((path, REPOSITORY / name, _anchor("".join(section))))
    lost = [str(path) for path, page, anchor in named if not page.exists() or anchor and anchor not in _anchors(page)]
    assert len(named) > 20 and lost == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11; CI runs this there")
def test_every_data_file_is_listed():
    import tomllib

    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = REPOSITORY / "dinov2_custom"
    listed = {path for pattern in patterns["dinov2_custom"] for path in package.glob(pattern)}
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")}
    assert data and data == listed


def test_citation_is_valid_and_of_this_version():
    import yaml

    import dinov2_custom

    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # what version 1.2.0 requires
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["license"] == "Apache-2.0"
    assert cited["version"] == dinov2_custom.__version__
    for entry in [cited, *cited["references"]]:
        assert entry["authors"] and all(set(one) <= {"name", "family-names", "given-names"} for one in entry["authors"])


def test_kaggles_metadata_names_the_notebook_and_a_title_of_that_slug():
    folder = REPOSITORY / "notebooks"
    kernel = json.loads((folder / "kaggle" / "kernel-metadata.json").read_text())
    user, slug = kernel["id"].split("/")
    assert user == "INSERT_USER_NAME" and slug == kernel["title"].lower().replace(" ", "-")  # as Kaggle forms it
    assert (folder / kernel["code_file"]).is_file() and kernel["kernel_type"] == "notebook"
    assert kernel["language"] == "python" and kernel["enable_internet"] is True, "pip needs the network"


def test_recipes_for_kaggle_are_of_its_folders():
    from dinov2_custom.configs.load import load_run_config

    for path in (REPOSITORY / "configs" / "kaggle").glob("*.yaml"):
        train = load_run_config(str(path), [], output_dir="").train
        assert train.dataset_path == f"/kaggle/input/{path.stem}" and train.output_dir == f"/kaggle/working/{path.stem}"


def test_every_file_of_a_dockerfile_step_is_sent():
    """Every path that the image installs from is let through by .dockerignore, and nothing else is."""
    from tests.packaging.dockerfile import instructions, is_sent

    steps = instructions((REPOSITORY / "Dockerfile").read_text())
    assert [name for name, _ in steps if name in ("FROM", "COPY", "RUN", "ENTRYPOINT")] == [
        "FROM", "COPY", "RUN", "ENTRYPOINT",
    ]  # fmt: skip
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    sent = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "configs/vits.yaml", "dinov2_custom/cli.py")
    left = (".git/config", ".venv/bin/python", "tests/conftest.py", "out/config.yaml", "configs/__pycache__/a.pyc")
    assert [path for path in sent if not is_sent(path, patterns)] == []
    assert [path for path in left if is_sent(path, patterns)] == []
