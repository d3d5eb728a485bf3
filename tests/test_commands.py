"""The commands that hints name: in a checkout, and where only a wheel is installed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dinov2_custom import commands
from dinov2_custom.verify.args import get_args_parser
from tests.train.batches import TINY
from tests.train.test_train import write_images

REPOSITORY = Path(__file__).resolve().parents[1]
SHORT = ["train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=1", "optim.warmup_epochs=0", "train.num_workers=0"]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter of its own environment, with our wheel and this environment's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        REPOSITORY / "dinov2_custom", source / "dinov2_custom", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    # the folders alone: what an editable installation has put there finds nothing
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    return str(folder / "venv" / "bin" / "python")


def run(python, folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_checkout_names_its_scripts(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    scripts = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "run").rglob("*.py")}
    needs_checkout = {"run/quickstart.py", "run/patches/apply.py"}  # its recipe, its patches
    assert set(commands.MODULES) == scripts - needs_checkout
    assert all(commands.command(script) == f"python {script}" for script in commands.MODULES)
    assert "configs/vits.yaml" in commands.small_recipe()


def test_readmes_trainings_have_a_directory_each():
    """One after the other, as a reader gives them: a run of another architecture is refused in the first one's."""
    blocks = re.findall(r"```\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    trainings = [shlex.split(line) for line in lines if line.startswith("python run/train/train.py ")]
    folders = [words[words.index("--output-dir") + 1] for words in trainings]
    assert len(folders) >= 3 and len(set(folders)) == len(folders)


@pytest.mark.parametrize("script", commands.MODULES)
def test_elsewhere_the_module_is_named_and_there(python, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = commands.command(script)
    assert named.startswith("python -m dinov2_custom.")
    done = run(python, tmp_path, *shlex.split(named)[1:], "--help")
    assert done.returncode == 0 and " ".join(done.stdout.split()).startswith(f"usage: {named} "), done.stderr
    assert "run/" not in done.stdout and "configs/vits" not in done.stdout


@pytest.mark.parametrize("script", [*commands.MODULES, "run/quickstart.py", "run/patches/apply.py", "sky/costs.py"])
def test_a_wrong_flag_is_answered_in_two_lines(script):
    done = run(sys.executable, REPOSITORY, script, "--no-such-flag")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and lines[0].startswith("error: "), done.stderr
    assert lines[-1].startswith("help: ") and lines[-1].endswith(f"{Path(script).name} --help") and len(lines) <= 3


@pytest.mark.parametrize(
    "flag, said", [("--outdir=x", " -> did you mean --output-dir?"), ("--nothing-like-it", "")], ids=str
)
def test_a_misspelled_flag_is_answered_with_the_nearest(flag, said, capsys):
    parser = get_args_parser()
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["/my/images", flag, "x"])
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"error: unrecognized arguments: {flag} x{said}"


@pytest.mark.parametrize("package", ["verify", "prepare", "embed", "export"])
def test_a_main_module_is_not_silent(python, tmp_path, package):
    done = run(python, tmp_path, "-m", f"dinov2_custom.{package}.main", "--help")
    assert done.stdout.startswith(f"usage: python -m dinov2_custom.{package}"), done.stderr


def test_the_hints_of_an_installation_can_be_followed(python, tmp_path):
    images = write_images(tmp_path / "images", 4)
    train = [
        "-m",
        "dinov2_custom.run.train.train",
        "--output-dir",
        "out",
        f"train.dataset_path={images}",
        *TINY,
        *SHORT,
    ]
    done = run(python, tmp_path, *train)
    assert done.returncode == 0, done.stderr
    hint = re.search(r"next: python (.*) --train-dataset", done.stdout)[1]
    for name in ("train", "val"):
        write_images(tmp_path / name / "a", 2)
        write_images(tmp_path / name / "b", 2)
    labelled = ["--train-dataset", "LabelledFolder:root=train", "--val-dataset", "LabelledFolder:root=val"]
    sizes = ["--nb_knn", "1", "--resize-size", "32", "--crop-size", "32", "--num-workers", "0", "--output-dir", "knn"]
    followed = run(python, tmp_path, *shlex.split(hint), *labelled, *sizes)
    assert followed.returncode == 0 and (tmp_path / "knn" / "results_eval_knn.json").exists(), followed.stderr
    unknown = run(python, tmp_path, *train, "nosuchkey=1")
    assert "`python -m dinov2_custom.configs.document`" in unknown.stderr
    assert run(python, tmp_path, "-m", "dinov2_custom.configs.document").stdout.startswith("# Configuration")
    where = run(python, tmp_path, "-c", "import dinov2_custom; print(dinov2_custom.__file__)").stdout
    assert where.startswith(str(Path(python).parents[1])), "the installation was tried, not the checkout"
