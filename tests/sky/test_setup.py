"""The setup block as a node runs it: the environment is created once, and again after an interruption.

``pip`` and ``venv`` are stand-ins that record their arguments.
"""

import os
import subprocess
import sys

import yaml

from tests.sky.conftest import REPOSITORY

SETUP = yaml.safe_load((REPOSITORY / "sky" / "train.yaml").read_text())["setup"]
PYTHON = f"""#!/bin/sh
echo "$(basename $(dirname $(dirname $0))): $*" >>"$CALLS"
case "$*" in
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip "*) sleep 0.3; [ ! -e "$CALLS.offline" ] ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


class Node:
    """One machine: its home, its environment, its calls of Python."""

    def __init__(self, folder):
        python = folder / "system" / "bin" / "python3"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.home, self.calls = folder / "home", folder / "calls.txt"
        self.home.mkdir()
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV")}  # of make
        self.env = {
            **inherited,
            "HOME": str(self.home),
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
        }

    def setup(self, **changes: str) -> subprocess.CompletedProcess:
        self.calls.write_text("")
        command = ["bash", "-c", SETUP]
        env = {**self.env, **changes}
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=600)
        assert "Traceback" not in done.stderr
        return done

    def installs(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if " -m venv " in line or " -m pip " in line]


def test_an_environment_is_made_once(tmp_path):
    node = Node(tmp_path / "node")
    assert node.setup().returncode == 0
    venv = node.home / "dinov2-venv"
    assert node.installs() == [
        f"system: -m venv --clear {venv}",
        "dinov2-venv: -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[fast,wandb]",
    ]
    assert node.setup().returncode == 0
    assert node.installs() == []


def test_an_install_that_broke_off_is_made_again(tmp_path):
    node = Node(tmp_path / "node")
    offline = tmp_path / "node" / "calls.txt.offline"
    offline.touch()
    assert node.setup().returncode != 0
    offline.unlink()
    assert node.setup().returncode == 0 and len(node.installs()) == 2
    assert node.setup().returncode == 0 and node.installs() == []

    (node.home / "dinov2-venv.made").write_text("another recipe\n")
    assert node.setup().returncode == 0 and len(node.installs()) == 2


def test_an_existing_environment_is_used_unchanged(tmp_path):
    node = Node(tmp_path / "node")
    own = tmp_path / "own" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text(PYTHON)
    own.chmod(0o755)
    (tmp_path / "own" / "precious").touch()
    assert node.setup(VENV=str(tmp_path / "own")).returncode == 0
    assert node.installs() == [] and (tmp_path / "own" / "precious").exists()
    assert not list(tmp_path.glob("own.*"))  # its folder may be read-only

    own.write_text("#!/bin/sh\nexit 1\n")
    done = node.setup(VENV=str(tmp_path / "own"))
    assert done.returncode == 1 and "to have dinov2_custom, got an environment without it" in done.stderr
    assert (tmp_path / "own" / "precious").exists()


def test_nodes_that_share_a_home_install_once(tmp_path):
    node = Node(tmp_path / "node")
    node.calls.write_text("")
    command = ["bash", "-c", SETUP]
    both = [subprocess.Popen(command, cwd=REPOSITORY, env=node.env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    assert len(node.installs()) == 2


def test_an_old_python_is_refused(tmp_path):
    node = Node(tmp_path / "node")
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.8.10;; *) exit 1;; esac\n')
    old.chmod(0o755)
    done = node.setup(PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr == "error: expected Python 3.10 or newer, got Python 3.8.10; set PYTHON\n"
