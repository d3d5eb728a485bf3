"""The interpreter in a real job is the requested one; otherwise the job reports that and ends."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.slurm.conda_prefix import make_conda_prefix


def other_python() -> str | None:
    """Return an interpreter of a different version, from PATH or pyenv."""
    for minor in (10, 11, 12, 13, 14):
        if minor == sys.version_info.minor:
            continue
        found = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3.{minor}"))
        found += [Path(p) for p in [shutil.which(f"python3.{minor}")] if p]
        for path in found:
            if subprocess.run([path, "-c", "import venv, json"], capture_output=True).returncode == 0:
                return str(path)
    return None


def add_submitit(prefix: Path) -> None:
    """Install submitit, the only requirement of a job besides Python, into ``prefix``; it suits all versions."""
    site = next(prefix.glob("lib/python3*/site-packages"))
    for name in ("submitit", "cloudpickle", "typing_extensions"):
        module = Path(importlib.util.find_spec(name).origin)
        source = module.parent if module.name == "__init__.py" else module
        (site / source.name).symlink_to(source)


def submit(cluster, out: Path, *flags: object, check: bool = True):
    small = ["--ngpus", 1, "--cpus-per-task", 1, "--timeout", 5, "--output-dir", out]
    return cluster.run(sys.executable, "-m", "tests.slurm.who", *small, *flags, check=check, cwd=out.parent)


def who(cluster, out: Path, *flags: object) -> dict:
    job = submit(cluster, out, *flags).stdout.split()[1]
    cluster.wait(job)
    return json.loads((out / "who.json").read_text())


def refused(cluster, out: Path, job: str) -> str:
    """Return the sentence in the job's log."""
    cluster.wait(job, states=["FAILED"])
    errors = [line for line in (out / f"{job}_log.out").read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and not (out / "who.json").exists()
    return errors[0]


@pytest.fixture(scope="module")
def two_venvs(tmp_path_factory):
    """Environments of this and, if available, another version of Python; name: (folder, version)."""
    folder = tmp_path_factory.mktemp("venvs")
    venv.create(folder / "this one", symlinks=True)
    found = {"this": (folder / "this one", list(sys.version_info[:2]))}
    other = other_python()
    if other:
        subprocess.run([other, "-m", "venv", "--without-pip", folder / "other"], check=True)
        version = subprocess.run(
            [other, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True
        )
        found["other"] = (folder / "other", [int(part) for part in version.stdout.split()])
    for prefix, _ in found.values():
        add_submitit(prefix)
    return found


def test_the_submitting_interpreter(cluster, tmp_path):
    foreign = {"RANK": "7", "MASTER_PORT": "1", "OMPI_COMM_WORLD_RANK": "3", "PMI_RANK": "3", "SLURM_PROCID": "5"}
    other = type(cluster)(cluster.folder)
    other.environment = cluster.environment | foreign
    facts = who(other, tmp_path / "out", "--slurm", "export=ALL,RANK=8,PMI_SIZE=2")
    assert (facts["executable"], facts["prefix"]) == (sys.executable, sys.prefix)
    assert facts["foreign"] == {}, "of the shell that submits"


def test_a_container(cluster, tmp_path):
    """A fake tool that prints its arguments and runs the command after the image."""
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "apptainer").write_text(
        '#!/bin/bash\nwhile [ "$1" != lab.sif ]; do shift; done\nHOOK=$1 exec "${@:2}"\n'
    )
    for name in ("python3", "apptainer"):
        (tmp_path / name).chmod(0o755)
    facts = who(cluster, tmp_path / "out", "--container", "lab.sif", "--setup", f"PATH={tmp_path}:$PATH")
    assert (facts["executable"], facts["HOOK"]) == (sys.executable, "lab.sif")


@pytest.mark.parametrize("name", ["this", "other"])
def test_virtual_environments(cluster, tmp_path, two_venvs, name):
    if name not in two_venvs:
        pytest.skip("needs a second Python of 3.10 or later")
    folder, version = two_venvs[name]
    facts = who(cluster, tmp_path / "out", "--venv", folder, "--setup", "export FROM_LINE='two words'")
    assert (facts["prefix"], facts["version"], facts["VIRTUAL_ENV"]) == (str(folder), version, str(folder))
    assert facts["FROM_LINE"] == "two words"


def test_a_setup_line_that_activates_an_environment_means_it(cluster, tmp_path, two_venvs):
    folder, version = list(two_venvs.values())[-1]
    facts = who(cluster, tmp_path / "out", "--setup", f"source '{folder}/bin/activate'")
    assert (facts["prefix"], facts["version"]) == (str(folder), version)


def test_a_real_conda_prefix(cluster, tmp_path):
    prefix = make_conda_prefix(tmp_path / "envs" / "lab", hook="export HOOK=ran\n")
    add_submitit(prefix)
    other = type(cluster)(cluster.folder)
    other.environment = cluster.environment | {"CONDA_ENVS_PATH": str(tmp_path / "envs")}
    facts = who(other, tmp_path / "out", "--conda-env", "lab")
    assert (facts["prefix"], facts["CONDA_PREFIX"], facts["HOOK"]) == (str(prefix), str(prefix), "ran")


@pytest.mark.skipif(not Path("/usr/share/modules").exists(), reason="needs environment-modules: tests/slurm/install.sh")
def test_real_modules(cluster, tmp_path, two_venvs):
    folder, version = list(two_venvs.values())[-1]
    modules = tmp_path / "modulefiles"
    (modules / "lab-python").mkdir(parents=True)
    (modules / "lab-python" / "3").write_text(f"#%Module\nprepend-path PATH {{{folder}/bin}}\n")
    (modules / "harmless").write_text("#%Module\nsetenv FROM_LINE module\n")
    environment = cluster.environment | {"MODULEPATH": str(modules)}
    cluster = type(cluster)(cluster.folder)
    cluster.environment = environment
    facts = who(cluster, tmp_path / "out", "--modules", "harmless", "lab-python")
    assert (facts["prefix"], facts["version"], facts["FROM_LINE"]) == (str(folder), version, "module")
    assert facts["LOADEDMODULES"] == "harmless:lab-python/3"
    kept = who(cluster, tmp_path / "kept", "--modules", "harmless")
    assert (kept["executable"], kept["FROM_LINE"]) == (sys.executable, "module")

    job = submit(cluster, tmp_path / "bad", "--modules", "absent").stdout.split()[1]
    assert "this step of the environment failed: module load absent" in refused(cluster, tmp_path / "bad", job)


def test_an_environment_that_is_gone_when_the_job_starts(cluster, tmp_path):
    venv.create(tmp_path / "v", symlinks=True)
    add_submitit(tmp_path / "v")
    job = submit(cluster, tmp_path / "out", "--venv", tmp_path / "v", "--slurm", "hold").stdout.split()[1]
    shutil.rmtree(tmp_path / "v")
    cluster.run("scontrol", "release", job)
    error = refused(cluster, tmp_path / "out", job)
    assert f"this step of the environment failed: activating {tmp_path / 'v'}" in error


def test_an_interpreter_that_is_gone_when_the_job_starts(cluster, tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    flags = [
        "--python",
        tmp_path / "python",
        "--setup",
        "export A=1",
        "--slurm",
        "hold",
    ]  # not run where it is submitted
    job = submit(cluster, tmp_path / "out", *flags).stdout.split()[1]
    (tmp_path / "python").unlink()
    cluster.run("scontrol", "release", job)
    assert f"there is no interpreter {tmp_path / 'python'}" in refused(cluster, tmp_path / "out", job)


def test_another_interpreter_than_asked_for(cluster, tmp_path):
    venv.create(tmp_path / "v", symlinks=True)
    add_submitit(tmp_path / "v")
    job = submit(cluster, tmp_path / "out", "--venv", tmp_path / "v", "--slurm", "hold").stdout.split()[1]
    (tmp_path / "v" / "bin" / "python").unlink()
    (tmp_path / "v" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    os.chmod(tmp_path / "v" / "bin" / "python", 0o755)
    cluster.run("scontrol", "release", job)
    assert f"belongs to {sys.prefix}, expected {tmp_path / 'v'}" in refused(cluster, tmp_path / "out", job)


def test_an_environment_without_this_package(cluster, tmp_path):
    venv.create(tmp_path / "v", symlinks=True)
    flags = ["--setup", f"unset PYTHONPATH; source {tmp_path}/v/bin/activate"]
    job = submit(cluster, tmp_path / "out", *flags).stdout.split()[1]
    assert "cannot import dinov2_custom: ModuleNotFoundError" in refused(cluster, tmp_path / "out", job)

    cluster = type(cluster)(cluster.folder)
    repository = cluster.environment.pop("PYTHONPATH")
    code = (
        f"import sys, runpy; sys.path.insert(0, {repository!r})\nrunpy.run_module('tests.slurm.who', None, '__main__')"
    )
    flags = ["--ngpus", "1", "--output-dir", tmp_path / "never", "--venv", tmp_path / "v"]
    done = cluster.run(sys.executable, "-c", code, *flags, check=False, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(
        "error: --venv: expected an environment with dinov2_custom, got"
    )
    assert not (tmp_path / "never").exists()


def test_a_setup_line_that_fails(cluster, tmp_path):
    job = submit(cluster, tmp_path / "out", "--setup", "export A=1", "--setup", "ls /no/such/folder").stdout.split()[1]
    assert "this step of the environment failed: --setup ls /no/such/folder" in refused(cluster, tmp_path / "out", job)
