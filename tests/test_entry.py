"""What every script says when a disk is full, a package missing or its reader gone, and what stays a fault."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2_custom import entry
from dinov2_custom.errors import ConfigError

PRINTS = """
import sys
from dinov2_custom import entry
def main():
    for i in range({lines}):
        print(i)
    print("done", file=sys.stderr)
    return 3
sys.exit(entry.reported(main))
"""


def failing(number, *names):
    def main():
        raise OSError(number, os.strerror(number), *names)

    return main


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_no_room_is_one_sentence(capsys, number):
    assert entry.reported(failing(number, "/runs/config.yaml"), error_code=2) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: expected room to write for /runs/config.yaml, got {os.strerror(number)}; make room")
    assert said.count("\n") == 1


def test_a_really_full_file_too(capsys):
    def main():
        with open("/dev/full", "w") as file:
            file.write("x")

    if not os.path.exists("/dev/full"):
        pytest.skip("NO FULL FILE: /dev/full is Linux's")
    assert entry.reported(main) == 1
    assert capsys.readouterr().err.startswith("error: expected room to write, got No space left on device")


def test_other_faults_keep_their_traceback():
    with pytest.raises(OSError):
        entry.reported(failing(errno.EIO))


def run_with_a_reader_that_leaves(code):
    read, write = os.pipe()
    os.close(read)
    try:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        os.close(write)


def test_a_reader_that_leaves_early_ends_it_without_a_word():
    done = run_with_a_reader_that_leaves(PRINTS.format(lines=100000))
    assert (done.returncode, done.stderr) == (141, "")


def test_a_reader_that_leaves_before_a_short_text_is_written_changes_nothing():
    done = run_with_a_reader_that_leaves(PRINTS.format(lines=1))
    assert (done.returncode, done.stderr) == (3, "done\n")


def test_another_broken_pipe_is_an_error_like_any_other():
    def main():
        raise BrokenPipeError("a socket")

    with pytest.raises(BrokenPipeError, match="a socket"):
        entry.reported(main)


def test_a_package_that_everything_needs_is_named(capsys):
    def main():
        raise ModuleNotFoundError("No module named 'torch'", name="torch.nn")

    assert entry.reported(main) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: expected torch in the environment of {sys.executable}, found none; activate ")
    assert error.count("\n") == 1


def test_another_missing_module_is_a_mistake_of_ours():
    def main():
        raise ModuleNotFoundError("No module named 'x'", name="dinov2_custom.x")

    with pytest.raises(ModuleNotFoundError):
        entry.reported(main)


def test_errors_are_one_line(capsys):
    def main():
        raise ConfigError("expected a, got b")

    assert entry.reported(main) == 1
    assert capsys.readouterr().err == "error: expected a, got b\n"


def test_the_requirements_are_those_of_the_package():
    names = {"pillow": "PIL", "pyyaml": "yaml"}
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    listed = text.partition("\ndependencies = [\n")[2].partition("\n]")[0].split()
    plain = [line.strip('",').partition(">")[0] for line in listed]
    assert {names.get(name, name) for name in plain} == set(entry._REQUIREMENTS)
