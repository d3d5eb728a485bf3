"""Blocks are inserted once and removed byte for byte, nothing else changes; other checkouts are rejected by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2_custom.cli import patches_parser as get_args_parser
from dinov2_custom.errors import ConfigError
from dinov2_custom.patching import checkout as blocks
from dinov2_custom.patching.main import main, patches_folder, readme_with_table
from dinov2_custom.patching.patch_file import read_patch, read_series

REPOSITORY = Path(__file__).resolve().parents[2]
SERIES = read_series(patches_folder())


def apply(folder, *flags):
    return main(get_args_parser().parse_args([str(folder), *flags]))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_applied_twice_and_reverted(checkout, capsys):
    before = contents(checkout)
    apply(checkout)
    after = contents(checkout)
    assert before.keys() == after.keys()
    changed = {path for path in before if before[path] != after[path]}
    assert {str(path) for path in changed} == {path for patch in SERIES for path in patch.symbols}
    assert all(after[path].startswith(before[path]) for path in changed)
    apply(checkout)
    assert contents(checkout) == after
    assert "nothing to change" in capsys.readouterr().out
    apply(checkout, "--revert")
    assert contents(checkout) == before


def test_only_some(checkout, capsys):
    before = contents(checkout)
    apply(checkout, "--only", "skip_bad_images")
    apply(checkout, "--only", "unlabeled_datasets")
    loaders = (checkout / "dinov2/data/loaders.py").read_text()
    assert loaders.index("patch unlabeled_datasets") < loaders.index("patch skip_bad_images")  # the series' order
    capsys.readouterr()
    apply(checkout, "--status")
    states = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert states["skip_bad_images"] == "applied" and states["koleo"] == "not applied"
    apply(checkout, "--revert", "--only", "unlabeled_datasets")
    assert blocks.read_file(checkout / "dinov2/data/loaders.py").blocks.keys() == {"skip_bad_images"}
    apply(checkout, "--revert", "--only", "skip_bad_images,koleo")
    assert contents(checkout) == before
    with pytest.raises(ConfigError, match="--only: expected some of no_xformers, .*, got nonsense, more"):
        apply(checkout, "--only", "nonsense,koleo,more")


def test_revert_names_what_was_there(checkout, capsys):
    apply(checkout, "--revert")
    assert capsys.readouterr().out == "reverted: none (nothing to change)\n"
    apply(checkout, "--only", "koleo,last_teacher")
    capsys.readouterr()
    apply(checkout, "--revert", "--only", "koleo,exact_resume")
    assert capsys.readouterr().out.endswith("\nreverted: koleo (1 files changed)\n")
    apply(checkout, "--revert")
    assert capsys.readouterr().out.endswith("\nreverted: last_teacher (1 files changed)\n")


def test_a_fork_that_trains_on_functions_of_its_own(checkout, capsys):
    """Evaluations still call upstream's make_dataset, and the training module still imports it."""
    loaders, train = checkout / "dinov2/data/loaders.py", checkout / "dinov2/train/train.py"
    own = "\n\ndef make_custom_dataset(**kwargs):\n    return []\n"
    own += "\n\ndef make_custom_loader(**kwargs):\n    return ShardedInfiniteSampler(**kwargs)\n"
    loaders.write_text(loaders.read_text() + own)
    text = "from dinov2.data.loaders import make_custom_dataset, make_custom_loader\n" + train.read_text()
    text = text.replace("= make_dataset(", "= make_custom_dataset(")
    train.write_text(text.replace("= make_data_loader(", "= make_custom_loader("))
    apply(checkout)
    *_, applied, first, second, third = capsys.readouterr().out.splitlines()
    idle = {"unlabeled_datasets": "make_dataset", "skip_bad_images": "make_dataset", "exact_resume": "make_data_loader"}
    names = ", ".join(patch.name for patch in SERIES if patch.name not in idle)
    assert applied.startswith(f"applied: {names} (")
    for line, (name, function) in zip((first, second, third), idle.items(), strict=True):
        assert line.startswith(f"{name}: in place, but without effect")
        assert f"training never uses dinov2/data/loaders.py: {function};" in line
    apply(checkout, "--status", "--only", "koleo,skip_bad_images")
    skip, koleo = capsys.readouterr().out.splitlines()
    assert "applied; without effect" in skip and koleo.endswith(" applied")


def test_diff_changes_nothing(checkout, capsys):
    before = contents(checkout)
    apply(checkout, "--diff")
    shown = capsys.readouterr().out
    assert contents(checkout) == before
    added = [line for line in shown.splitlines() if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in shown.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert "+from dinov2_custom.patching.datasets import collate_data_and_cast" in added and not removed


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n\n", b"\r\n", b"\n\t# no line ending"])
def test_every_kind_of_line_ending_comes_back(checkout, ending):
    path = checkout / "dinov2/loss/koleo_loss.py"
    original = path.read_bytes().rstrip(b"\n") + ending
    if ending == b"\r\n":
        original = original.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(original)
    path.chmod(0o640)
    apply(checkout, "--only", "koleo")
    assert path.read_bytes().startswith(original) and path.stat().st_mode & 0o777 == 0o640
    compile(path.read_bytes(), path, "exec")
    assert (b"\n" in path.read_bytes().replace(b"\r\n", b"")) == (ending != b"\r\n")
    apply(checkout, "--revert")
    assert path.read_bytes() == original


@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_what_the_user_writes_after_a_block_stays(checkout, ending):
    path = checkout / "dinov2/loss/koleo_loss.py"
    original = path.read_bytes().rstrip(b"\n") + ending
    path.write_bytes(original)
    apply(checkout, "--only", "koleo")
    path.write_bytes(path.read_bytes() + b"MINE = 1\n")
    apply(checkout, "--only", "koleo")
    apply(checkout, "--revert")
    assert path.read_bytes() == original.rstrip(b"\n") + b"\nMINE = 1\n"


def test_an_older_block_is_renewed_and_an_unknown_one_reverted(checkout, capsys):
    path = checkout / "dinov2/loss/koleo_loss.py"
    before = path.read_bytes()
    file = blocks.read_file(path)
    path.write_bytes(blocks.with_blocks(file, {"koleo": "OLD = 1\n", "dropped_since": "X = 1\n"}))
    apply(checkout, "--status", "--only", "koleo")
    assert "another version is applied" in capsys.readouterr().out
    apply(checkout, "--only", "koleo")
    assert b"OLD" not in path.read_bytes() and b"dropped_since" in path.read_bytes()
    apply(checkout, "--revert")
    assert path.read_bytes() == before


def test_missing_names_are_all_listed_and_nothing_is_written(checkout, capsys):
    loaders, submit = checkout / "dinov2/data/loaders.py", checkout / "dinov2/run/submit.py"
    loaders.write_text(loaders.read_text().replace("def make_data_loader", "def build_loader"))
    submit.unlink()
    train = checkout / "dinov2/train/train.py"
    train.write_text(train.read_text().replace("seed=start_iter", "seed=cfg.train.seed"))
    before = contents(checkout)
    with pytest.raises(ConfigError) as error:
        apply(checkout)
    lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
    assert lines == [
        "output_dir: dinov2/run/submit.py: no such file",
        "exact_resume: dinov2/data/loaders.py has no make_data_loader",
        "exact_resume: dinov2/train/train.py: no call with seed=start_iter",
    ]
    assert contents(checkout) == before
    apply(checkout, "--status", "--only", "exact_resume")
    assert "cannot be applied: dinov2/data/loaders.py has no make_data_loader" in capsys.readouterr().out
    apply(checkout, "--only", "koleo,unlabeled_datasets")


def test_methods_and_branches_are_found(tmp_path):
    path = tmp_path / "dinov2" / "m.py"
    path.parent.mkdir()
    path.write_text(
        "try:\n    from a import b as c\nexcept ImportError:\n    c, (d, e) = None, (1, 2)\n"
        "class K:\n    if True:\n        def m(self): pass\n    x: int = 1\nfor i in ():\n    y = 1\nimport p.q\n"
    )
    patch = SERIES[0]._replace(symbols={"dinov2/m.py": ["c", "d", "e", "K", "K.m", "K.x", "y", "p"]}, requires={})
    assert blocks.missing_symbols(patch, tmp_path) == []
    patch = patch._replace(symbols={"dinov2/m.py": ["b", "m", "q"]})
    assert blocks.missing_symbols(patch, tmp_path) == [f"no_xformers: dinov2/m.py has no {name}" for name in "bmq"]
    path.write_text("def broken(:\n")
    assert "not valid Python" in blocks.missing_symbols(patch, tmp_path)[0]


def test_where_the_checkout_is(checkout, tmp_path):
    assert blocks.find_package(str(checkout)) == blocks.find_package(str(checkout / "dinov2")) == checkout
    (tmp_path / "dinov2").mkdir()
    (tmp_path / "dinov2" / "__init__.py").touch()
    for wrong in (tmp_path / "nowhere", tmp_path, REPOSITORY):
        with pytest.raises(ConfigError, match="expected a checkout of dinov2"):
            blocks.find_package(str(wrong))


def test_script(checkout):
    before = contents(checkout)
    command = [sys.executable, "run/patches/apply.py", str(checkout)]
    for flags, code in (([], 0), (["--status"], 0), (["--only", "x"], 1), (["--revert"], 0)):
        env = {"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]}
        done = subprocess.run([*command, *flags], cwd=REPOSITORY, capture_output=True, text=True, env=env)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert contents(checkout) == before


@pytest.mark.parametrize(
    "source, problem",
    [
        ('"""T.\n\nWhy: x\n"""\n', "missing \\['Target'"),
        ('"""T.\n\nWhy: x\nTarget: a.py: f\nKind: x\nUpstream: x\nDrop-When: x\nTest: x\nOdd: x\n"""\nx = 1\n', "Odd"),
        (
            '"""T.\n\nWhy: x\nTarget: a.py: f\nKind: x\nUpstream: x\nDrop-When: x\nTest: x\n"""\n# in b.py\nx = 1\n',
            "code for \\['b.py'\\]",
        ),
        ("def broken(:\n", "could not read it"),
    ],
)
def test_bad_patches_are_refused(source, problem, tmp_path):
    (tmp_path / "one.py").write_text(source)
    (tmp_path / "series").write_text("one\nmissing\n")
    with pytest.raises(ConfigError, match=problem):
        read_patch(tmp_path / "one.py")
    with pytest.raises(ConfigError, match="(?s)one.py.*missing.py"):
        read_series(tmp_path)


def test_the_series_the_table_and_the_tests_are_current():
    assert {patch.name for patch in SERIES} == {path.stem for path in patches_folder().glob("*.py")}
    readme = (patches_folder() / "README.md").read_text()
    assert readme_with_table(readme, SERIES) == readme and "| `koleo` |" in readme
    for patch in SERIES:
        file, _, test = patch.fields["Test"].partition("::")
        assert f"def {test}(" in (REPOSITORY / file).read_text()


def test_no_line_of_upstream_is_here(wheel):
    """Names may be shared, lines may not."""
    theirs = {line.strip() for path in (wheel / "dinov2").rglob("*.py") for line in path.read_text().splitlines()}
    ours = [*patches_folder().glob("*.py"), *(REPOSITORY / "dinov2_custom" / "patching").glob("*.py")]
    lines = {line.strip() for path in ours for line in path.read_text().splitlines()}
    assert {line for line in lines & theirs if len(line) > 40} == set()
