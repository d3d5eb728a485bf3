"""Forked commands are what ``python <command>`` starts; test names are short, and their groups correct."""

import multiprocessing
import signal

import pytest

from tests.processes import Job, launch_source, run, running


def test_a_source_has_its_own_arguments_environment_folder_and_output(tmp_path):
    source = "import os, sys; print(sys.argv, os.getcwd(), dict(os.environ)); print(1, file=sys.stderr)"
    own = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = run("-c", source + "; sys.exit(3)", "a b", cwd=tmp_path, environment=own)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{['-c', 'a b']} {tmp_path} {own}\n", "1\n")


def test_a_script_and_a_module_are_the_main_module(tmp_path):
    (tmp_path / "own.py").write_text("import sys\nassert __name__ == '__main__'\nprint(sys.argv[1:], sys.path[0])\n")
    for command in ((f"{tmp_path}/own.py", "x"), ("-m", "own", "x")):
        assert run(*command, cwd=tmp_path).stdout == f"['x'] {tmp_path}\n"


def test_what_python_does_at_its_end_is_done_and_an_error_is_1():
    done = run("-c", "import atexit; atexit.register(print, 'bye'); 1 / 0")
    assert (done.returncode, done.stdout) == (1, "bye\n") and "ZeroDivisionError" in done.stderr


def test_the_start_method_of_processes_is_pythons():
    done = run("-c", "import multiprocessing; print(multiprocessing.get_start_method())")
    assert done.stdout.strip() == multiprocessing.get_context().get_start_method()


def test_several_are_a_group(tmp_path):
    source = "import torch\nfrom dinov2_custom import distributed\ndistributed.enable()\nrank = torch.ones(1)\n"
    source += "print(distributed.all_reduce(rank).item())\ndistributed.disable()\n"
    assert launch_source(tmp_path, source).stdout == "2.0\n2.0\n"


FAILS = """
import os, signal, sys, time
from pathlib import Path
from tests.processes import state, wait_until
file, letter = Path(sys.argv[1]), sys.argv[2]
if os.environ["RANK"] == "1":
    wait_until(lambda: file.exists() and state(file.read_text()) == letter, "the state of the other")
    sys.exit(7)
file.write_text(str(os.getpid()))
time.sleep(1000) if letter == "S" else os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.parametrize(("letter", "end"), [("S", signal.SIGTERM), ("T", signal.SIGKILL)], ids=["runs", "is stopped"])
def test_the_first_to_fail_ends_the_others(letter, end, tmp_path):
    job = Job("-c", FAILS, str(tmp_path / "pid"), letter, processes=2)
    assert job.wait() == 7
    assert [process.exitcode for process in job.processes] == [-end, 7]
    assert not running(process.pid for process in job.processes)


def test_names_of_tests_are_short_and_who_shares_a_files_fixture_shares_a_process(request):
    """Every process of pytest-xdist sends, receives and stores all names."""
    for item in request.session.items:
        assert len(item.nodeid) < 1000, item.nodeid[:200]
        scopes = [definitions[-1].scope for definitions in item._fixtureinfo.name2fixturedefs.values()]
        assert "module" not in scopes or item.get_closest_marker("xdist_group"), item.nodeid


@pytest.mark.parametrize("content", [bytes(10_000), "x" * 10_000])
def test_a_long_value_is_named_by_its_argument(content, request):
    assert "[content" in request.node.nodeid
