"""Resolving the requested environment at submission; tests/slurm checks the result inside jobs."""

import argparse
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from dinov2_custom.errors import LaunchError
from dinov2_custom.run import environment_check
from dinov2_custom.run.environment import conda_prefix, resolve


def asked(**given):
    names = ("conda_env", "venv", "python", "container", "modules", "setup", "output_dir")
    return argparse.Namespace(**{name: given.get(name) for name in names})


@pytest.fixture
def conda_env(tmp_path, monkeypatch):
    """A conda-like prefix that contains this interpreter and this package."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    prefix = tmp_path / "envs" / "la b"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "conda-meta").mkdir()
    (prefix / "bin" / "python").symlink_to(sys.executable)
    (prefix / "etc/conda/activate.d").mkdir(parents=True)
    (prefix / "etc/conda/activate.d/hook.sh").write_text('export HOOK="ran in $CONDA_PREFIX"\nfalse\n')
    (prefix / "conda-meta/state").write_text(json.dumps({"env_vars": {"FROM_STATE": "it's set"}}))
    return prefix


def run(lines, show):
    text = "\n".join(line for _, line in lines) + f"\n{show}\n"
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout


def test_default_is_the_submitting_interpreter():
    found = resolve(asked(), {})
    assert found.lines == () and found.executable == sys.executable and found.prefix == sys.prefix
    assert run([], f"echo {found.python}").strip() == sys.executable


def test_a_conda_prefix_is_activated_without_conda(conda_env):
    found = resolve(asked(conda_env=str(conda_env)), {})
    assert found.prefix == str(conda_env)
    shown = run(found.lines, f'echo "$HOOK|$FROM_STATE|$CONDA_PREFIX|${{PATH%%:*}}|"{found.python}')
    assert shown.strip() == "|".join(
        [f"ran in {conda_env}", "it's set", str(conda_env), f"{conda_env}/bin", f"{conda_env}/bin/python"]
    )


def test_a_conda_name_is_looked_up_where_conda_lists_environments(conda_env, tmp_path):
    (tmp_path / ".conda").mkdir()
    (tmp_path / ".conda/environments.txt").write_text(f"/gone/other\n{conda_env}\n")
    assert conda_prefix("la b", {"HOME": str(tmp_path)}) == conda_env
    assert conda_prefix("la b", {"HOME": "/", "CONDA_ENVS_PATH": str(tmp_path / "envs")}) == conda_env
    with pytest.raises(LaunchError, match=r"name of a conda environment \(.*la b.*\), got 'lab'"):
        conda_prefix("lab", {"HOME": str(tmp_path)})


def test_a_virtual_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # python -c finds packages of the working directory
    venv.create(tmp_path / "v", with_pip=False, symlinks=True)
    with pytest.raises(LaunchError, match="expected an environment with dinov2_custom, got from .*No module named"):
        resolve(asked(venv=str(tmp_path / "v")), {})
    found = resolve(asked(venv=str(tmp_path / "v"), setup=["export A=1"]), {})
    assert run(found.lines, 'echo "$A $VIRTUAL_ENV"').strip() == f"1 {tmp_path / 'v'}"
    assert found.prefix == str(tmp_path / "v")


@pytest.fixture(autouse=True)
def only_installed(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"venv": "/nope"}, "--venv: expected an environment with bin/python, got none at /nope"),
        ({"conda_env": "/nope"}, "--conda-env: expected an environment"),
        ({"python": "/nope/python"}, "--python: expected an interpreter"),
        ({"python": "exec 'x"}, "--python: expected a path or a command line"),
        ({"venv": "a", "conda_env": "b"}, "expected one of --conda-env, --venv, got 2 of them"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(LaunchError, match=message):
        resolve(asked(**given), {})


def test_an_interpreter_without_this_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # python -c finds packages of the working directory
    venv.create(tmp_path / "v", with_pip=False, symlinks=True)
    python = str(tmp_path / "v/bin/python")
    with pytest.raises(LaunchError, match="--python: expected an environment with dinov2_custom, got from .*No module"):
        resolve(asked(python=python), {})
    assert resolve(asked(python=python, setup=["export A=1"]), {}).executable == python


def old_pythons():
    return sorted(Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python3")) + sorted(
        Path("/usr/bin").glob("python3.[6-9]")
    )


@pytest.mark.parametrize("flag", ["--python", "--venv"])
def test_old_interpreter_is_reported_as_old(tmp_path, flag):
    if not (found := old_pythons()):
        pytest.skip("needs a Python of 3.6 to 3.9")
    python = found[0]
    if flag == "--venv":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python").symlink_to(python)
    given = {"python": str(python)} if flag == "--python" else {"venv": str(tmp_path)}
    with pytest.raises(LaunchError, match=rf"{flag}: expected Python 3.10 or later, got .*: Python 3.\d is too old$"):
        resolve(asked(**given), {})
    check = Path(environment_check.__file__).read_text()
    done = subprocess.run([python, "-c", check, "n1", "", ""], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.startswith("error: node n1") and "is too old" in done.stdout


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A fake container tool that prints its arguments and runs the command in them."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "python3").symlink_to(sys.executable)
    for command in ("bash", "basename", "env"):  # and no tool that this machine has
        (folder / command).symlink_to(shutil.which(command))

    def make(name):
        code = '#!/bin/bash\necho "$(basename "$0") $*" >&2\n'
        if name == "enroot":  # which passes on what --env names alone
            code += 'for word; do [ "$before" != --env ] || kept+=("${word%%=*}=${!word-}"); before=$word; done\n'
            code += 'exec env -i PATH="$PATH" "${kept[@]}" "${@: -3}"\n'
        (folder / name).write_text(code + 'exec "${@: -3}"\n')
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return make


@pytest.mark.parametrize("name, words", [("apptainer", "exec --nv"), ("singularity", "exec --nv"), ("enroot", "start")])
def test_container_uses_the_available_tool(tool, name, words):
    tool(name)
    found = resolve(asked(container="~/my image.sif", output_dir="/runs/a b/%j"), {})
    lines = "\n".join(line for _, line in found.lines)
    show = "import os; print(os.environ['SLURM_PROCID'])"
    done = subprocess.run(
        ["bash", "-c", f'set -e; {lines}\npython=({found.python})\nSLURM_PROCID="4 2" "${{python[@]}}" -c "{show}"'],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "4 2\n" and done.stderr.startswith(f"{name} {words} "), done.stderr
    assert (
        f"{Path.home()}/my image.sif python3 -c" in done.stderr
        and "/runs/a b" in done.stderr
        and "%j" not in done.stderr
    )


def test_no_container_tool(tmp_path):
    found = resolve(asked(container="image.sif", output_dir="/runs"), {})
    lines = "\n".join(line for _, line in found.lines)
    code = f"trap 'echo \"$step\"' EXIT; set -e; PATH={tmp_path}; {lines}"
    done = subprocess.run(["/bin/bash", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "no apptainer, singularity or enroot is on PATH\n"


def test_a_command_line_as_interpreter(tmp_path):
    found = resolve(asked(python=f"env A='two words' {sys.executable}"), {})
    code = f'python=({found.python}); "${{python[@]}}" -c "import os; print(os.environ[\'A\'])"'
    assert subprocess.run(["bash", "-c", code], capture_output=True, text=True).stdout == "two words\n"
    (tmp_path / "my python").symlink_to(sys.executable)
    alone = resolve(asked(python=str(tmp_path / "my python"), setup=["export A=1"]), {})
    assert alone.executable == str(tmp_path / "my python")


def test_variables_are_those_of_the_shell_that_submits(tmp_path, monkeypatch):
    """In quotes or in a cluster file, variables are not expanded by a shell."""
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    words = resolve(asked(python="env DATA=$HOME/data A=${HOME} ~/python3 -X 'a b'"), {}).python
    shown = subprocess.run(["bash", "-c", f"printf '%s|' {words}"], capture_output=True, text=True).stdout
    home = tmp_path / "my home"
    assert shown == f"env|DATA={home}/data|A={home}|{home}/python3|-X|a b|"
    ((_, found),) = resolve(asked(container="$HOME/lab.sif", output_dir="/runs"), {}).lines
    assert f" '{home}/lab.sif')" in found
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(sys.executable)
    setup = ["export A=1"]
    for given in ({"venv": "$HOME"}, {"conda_env": "$HOME"}, {"conda_env": "~"}):
        assert resolve(asked(**given, setup=setup), {}).prefix == str(home)
    assert resolve(asked(python="$HOME/bin/python", setup=setup), {}).executable == str(home / "bin/python")
    for given in ({"python": "env A=$NOT_THERE python3"}, {"venv": "${NOT_THERE}/v"}, {"container": "$NOT_THERE"}):
        with pytest.raises(LaunchError, match=r"expected variables that this shell has set, got \$\{?NOT_THERE"):
            resolve(asked(**given), {})


def test_setup_lines_that_bring_another_python_mean_that_one(tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\n")
    (tmp_path / "python3").chmod(0o755)
    harmless = resolve(asked(setup=["export A=1"]), {})
    assert run(harmless.lines, f"echo {harmless.python}").strip() == sys.executable
    other = resolve(asked(setup=[f"PATH={tmp_path}:$PATH"]), {})
    assert run(other.lines, f"echo {other.python}").strip() == str(tmp_path / "python3")
    named = resolve(asked(setup=[f"PATH={tmp_path}:$PATH"], python="python3"), {})
    assert run(named.lines, f"echo {named.python}").strip() == str(tmp_path / "python3")
