"""Messages of scripts for a full disk, a missing package or a closed pipe, and errors that stay tracebacks."""

import errno
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2_custom import entry
from dinov2_custom.data.pool import set_up_worker
from dinov2_custom.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[1]
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


LEFT_BEHIND = """
import sys, torch
from dinov2_custom import entry
from dinov2_custom.data.pool import set_up_worker
from dinov2_custom.errors import DataError
kept = []
def main():
    kept.append(iter(torch.utils.data.DataLoader(range(64), num_workers=1, worker_init_fn=set_up_worker)))
    next(kept[0])
    raise DataError("a bad image")
{end}
"""


def test_an_error_in_a_data_loading_process_is_one_sentence_too(capsys):
    def main():
        list(torch.utils.data.DataLoader(Unreadable(), num_workers=1, worker_init_fn=set_up_worker))

    assert entry.reported(main) == 1
    assert capsys.readouterr().err == "error: expected an image, got text: x.png\n"


class Unreadable(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError("expected an image, got text: x.png")


@pytest.mark.parametrize("end", ["sys.exit(entry.reported(main))", "entry.leave(entry.reported(main))"])
def test_an_error_does_not_wait_for_the_data_loading_processes(end):
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND.format(end=end)], capture_output=True, text=True, timeout=600, cwd=REPOSITORY
    )
    assert (done.returncode, done.stderr) == (1, "error: a bad image\n")


def failing(number, *names):
    def main():
        raise OSError(number, os.strerror(number), *names)

    return main


@pytest.mark.parametrize(
    "number, remedy",
    [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EROFS, "have the file system mounted for")],
)
def test_no_room_is_one_sentence(capsys, number, remedy):
    assert entry.reported(failing(number, "/runs/config.yaml"), error_code=2) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: expected room to write for /runs/config.yaml, got {os.strerror(number)}; {remedy}")
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


def test_any_name_can_be_printed_and_output_may_be_closed(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert entry.reported(lambda: print("é \udce9") or 0) == 0
    assert out.buffer.getvalue().split() == [rb"\xe9", rb"\udce9"]
    monkeypatch.setattr(sys, "stdout", None)
    assert entry.reported(lambda: print("nothing") or 0) == 0


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
    assert {names.get(name, name) for name in plain} == set(entry.REQUIREMENTS)


LEAVES = """
import atexit, ctypes, os, sys, time
from pathlib import Path
folder, how = Path(sys.argv[1]), sys.argv[2]
if os.environ["RANK"] == "0":  # the last that is done before Python goes down: keep it from the other threads
    atexit.register(ctypes.PyDLL(None).usleep, 2_000_000)
    atexit.register((folder / "leaving").touch)
import torch
import torch.distributed as dist
from dinov2_custom import distributed, entry
distributed.enable()
ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))  # caches of sharded tensors keep it for good, too
distributed.barrier()
work = dist.all_reduce(torch.ones(3), async_op=True) if os.environ["RANK"] == "0" else None
del work  # the group's thread has the last hold on the tensor, until the other process takes part
while os.environ["RANK"] == "1" and not (folder / "leaving").exists():
    time.sleep(0.01)
if os.environ["RANK"] == "1":
    dist.all_reduce(torch.ones(3))
distributed.disable()
print("done", flush=True)
entry.leave(0) if how == "leave" else sys.exit(0)
"""


def leave_in_order(folder, how):
    """Return the exit codes of two processes; a thread of the first one's group finishes while it exits."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", LEAVES, str(folder), how]
    jobs = []
    for rank in range(2):
        own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", **own}
        jobs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    said = [job.communicate(timeout=600)[0] for job in jobs]
    assert said == ["done\n", "done\n"]
    return [job.returncode for job in jobs]


def test_threads_of_a_process_group_do_not_abort_a_process_that_is_done(tmp_path):
    assert leave_in_order(tmp_path / "one", "leave") == [0, 0]
    if sys.version_info < (3, 14):  # what it is good for; on a busy machine both processes may meet it
        assert leave_in_order(tmp_path / "other", "exit")[0] == -signal.SIGABRT


def test_leaving_runs_what_was_registered_for_the_end(tmp_path):
    code = "import atexit; from dinov2_custom import entry; atexit.register(print, 'bye'); print('x', end=' '); "
    for world in ("1", "2"):
        own = {"RANK": "0", "WORLD_SIZE": world, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": world}
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "x", "MASTER_PORT": "1", **own}
        done = subprocess.run([sys.executable, "-c", code + "entry.leave(7)"], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (7, "x bye\n", "")
