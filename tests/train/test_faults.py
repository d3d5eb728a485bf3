"""Processes that die, hang or run out of memory: real ones, found in the run's log with their rank."""

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from dinov2_custom.errors import LostProcessError, ResourceError
from dinov2_custom.train import train as train_module
from dinov2_custom.train import watch as watch_module
from dinov2_custom.train.faults import describe_memory, is_out_of_memory, translate
from dinov2_custom.train.ranks import Ranks, describe_lost
from dinov2_custom.train.step_guard import StepGuard, _Report
from dinov2_custom.train.watch import Watch
from dinov2_custom.utils.transfer import HostCopy
from tests.processes import Job, wait_until
from tests.processes import run as run_script
from tests.train.batches import TINY, tiny_config
from tests.train.test_step_guard import run
from tests.train.test_train import write_images

SCRIPT = """
import contextlib, ctypes, os, signal, sys, time
from pathlib import Path
from dinov2_custom import entry
from dinov2_custom.train import train, watch
watch.LOOK_S, watch.GRACE_S = 0.03, 5.0  # many looks a beat, as with a time-out of minutes
make, fault, faulty_rank = train.make_train_loader, sys.argv.pop(1), int(sys.argv.pop(1))

def make_faulty(*args, rank=0, **kwargs):
    loader = make(*args, rank=rank, **kwargs)
    batches = loader.batches

    def with_fault(**options):
        for iteration, batch in enumerate(batches(**options)):
            if iteration == 3 and rank == faulty_rank:
                if fault == "raise":
                    raise RuntimeError("boom in the loader")
                if fault == "sleep":
                    time.sleep(1000)
                if fault == "mount":
                    folder = Path(sys.argv[-1]) / "logs" / "ranks"
                    while not (folder / f".rank0.{os.getpid()}").is_fifo():
                        with contextlib.suppress(FileExistsError):  # the watching thread is about to rename it
                            os.mkfifo(folder / f".rank0.{os.getpid()}")
                    os.mkfifo(folder / "slow")
                    open(folder / "slow", "w")  # opened for reading by nobody
                if fault == "hold":
                    ctypes.PyDLL(None).sleep(1000)  # keeps the interpreter to itself
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
            yield batch

    loader.batches = with_fault
    return loader

train.make_train_loader = make_faulty
entry.leave(entry.run("dinov2_custom.train.train", train.get_args_parser().parse_args()))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 12)


@pytest.mark.parametrize(
    ("fault", "rank", "expected"),
    [
        ("raise", 1, ["rank 1] Traceback (most recent call last)", "RuntimeError: boom in the loader"]),
        ("kill", 1, ["rank 1 (pid ", "is gone without a word"]),
        ("sleep", 1, ["no step for 3 s", "rank 1 hangs in ", "rank 0 waits for the others in "]),
        (
            "stop",
            0,
            ["rank 1] no step for 3 s", "rank 0 hangs: it is stopped (SIGSTOP", "rank 1 waits for "],
        ),
        (
            "hold",
            1,
            ["rank 0] no step for 3 s", "rank 1 hangs: it does not even beat any more", "rank 0 waits for "],
        ),
    ],
)
def test_a_lost_or_hanging_process_ends_the_job_and_is_named_in_the_log(images, tmp_path, fault, rank, expected):
    (tmp_path / "faulty.py").write_text(SCRIPT)
    arguments = [f"train.dataset_path={images}", *TINY, "train.num_workers=0", "train.hang_timeout=3"]
    arguments += ["train.max_steps=1000", "--output-dir", str(tmp_path / "out")]
    job = Job(str(tmp_path / "faulty.py"), fault, str(rank), *arguments, processes=2)
    assert job.wait() != 0
    log = (tmp_path / "out" / "logs" / "log.txt").read_text()
    for text in expected:
        assert text in log, log
    if fault in ("sleep", "stop", "hold"):
        assert 75 in [process.exitcode for process in job.processes]
        assert log.count("no step for") - log.count("broken connection: no step for") == 1  # said once, first


def alone(images, tmp_path, fault):
    (tmp_path / "faulty.py").write_text(SCRIPT)
    arguments = [f"train.dataset_path={images}", *TINY, "train.num_workers=0", "train.hang_timeout=2"]
    done = run_script(str(tmp_path / "faulty.py"), fault, "0", *arguments, "--output-dir", str(tmp_path / "o"))
    assert done.returncode == 75 and "Traceback" not in done.stderr
    return done.stderr


def test_a_process_alone_says_where_it_hangs(images, tmp_path):
    alone(images, tmp_path, "sleep")
    assert "rank 0 hangs in " in (tmp_path / "o" / "logs" / "log.txt").read_text()


def test_a_file_system_that_does_not_answer_ends_the_job_too(images, tmp_path):
    """Both threads wait in an open() that the system never ends, as on a mount whose server is gone."""
    said = alone(images, tmp_path, "mount")
    assert said.count("\n") == 1 and "error: no step for 2 s (train.hang_timeout): rank 0 hangs in " in said
    assert "at iteration=2 (pid" in said and f"the file system of {tmp_path / 'o'} does not answer" in said


def test_waiting_for_the_device_is_waiting_for_the_others(tmp_path):
    """With nccl it is the device that waits for the others; the process waits for it where it reads a report."""
    ended, there = threading.Event(), threading.Event()

    class Event:  # of CUDA, behind a collective
        def synchronize(self):
            there.set()
            ended.wait(100)

    guard = StepGuard(3, False, lambda: "none")
    guard._reports += [_Report(i, ["loss"], HostCopy(torch.ones(1), Event())) for i in range(2)]
    thread = threading.Thread(target=guard.poll)
    thread.start()
    there.wait(100)
    place, waits = watch_module._where(sys._current_frames()[thread.ident])
    ended.set()
    thread.join()
    assert "transfer.py" in place and waits


def test_a_watched_run_that_goes_on_is_left_alone(tmp_path):
    with Watch(tmp_path, hang_s=1.0) as watch:
        for iteration in range(40):
            watch.mark(iteration)
            time.sleep(0.05)
        assert describe_lost(tmp_path) == ""
    assert list((tmp_path / "logs" / "ranks").iterdir()) == []


def test_a_slow_step_that_ends_is_no_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "_states", lambda self, states=Watch._states: go_on(self, states))
    ended, suspected = [], []
    monkeypatch.setattr(os, "_exit", ended.append)

    def go_on(watch, states):  # the step ends just when the thread looks around
        suspected.append(watch.iteration)
        watch.mark(watch.iteration + 1)
        return states(watch)

    with Watch(tmp_path, hang_s=0.2) as watch:
        watch.mark(0)
        watch.mark(1)
        while len(suspected) < 3:
            time.sleep(0.05)
    assert suspected[:3] == [1, 2, 3] and not ended and not (tmp_path / "logs" / "log.txt").exists()


def test_time_in_which_the_system_holds_the_process_does_not_count(tmp_path, monkeypatch):
    ahead_s, ended = [0.0], []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(watch_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s[0]))
    with Watch(tmp_path, hang_s=3) as watch:
        watch.mark(0)
        watch.mark(1)
        ahead_s[0] = 1000.0
        time.sleep(1.2)  # the rest of the step: several looks
    assert not ended and not (tmp_path / "logs" / "log.txt").exists()


def test_a_suspended_job_goes_on(images, tmp_path):
    """Every process held for longer than the time-out, as by ``scontrol suspend``, and let go again."""
    (tmp_path / "slow.py").write_text(SCRIPT)
    arguments = [f"train.dataset_path={images}", *TINY, "train.num_workers=0", "train.hang_timeout=2"]
    arguments += ["train.max_steps=60", "train.log_every=1", "--output-dir", str(tmp_path / "out")]
    job = Job(str(tmp_path / "slow.py"), "none", "-1", *arguments, errors=tmp_path / "errors")
    metrics = tmp_path / "out" / "training_metrics.json"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, "two steps", [job])
    os.kill(job.pid, signal.SIGSTOP)
    time.sleep(5)
    assert len(metrics.read_text().splitlines()) < 60
    os.kill(job.pid, signal.SIGCONT)
    assert job.wait() == 0 and (tmp_path / "errors").read_text() == ""


def test_a_broken_connection_is_a_lost_process(tmp_path, monkeypatch):
    for name, value in (("is_enabled", True), ("get_global_size", 3), ("get_global_rank", 1)):
        monkeypatch.setattr(f"dinov2_custom.distributed.{name}", lambda value=value: value)
    broken = RuntimeError(
        "[/__w/pytorch/third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1. This is "
        "typically caused by a remote worker crashing. GLHF!"
    )
    told = translate(broken, tiny_config(), tmp_path, lambda run: "rank 2 is gone")
    assert isinstance(told, LostProcessError) and told.exit_code == 75 and "rank 2 is gone" in str(told)
    assert str(told).endswith(
        " (Connection closed by peer [127.0.0.1]:1); the same command goes on from the newest checkpoint"
    )
    assert "rank 1] expected all 3 processes" in (tmp_path / "logs" / "log.txt").read_text()
    assert "to another process (" in str(translate(broken, tiny_config(), tmp_path, lambda run: None))
    elsewhere = translate(broken, tiny_config(), tmp_path, lambda run: "", patience_s=0)
    assert "to a process on another machine (" in str(elsewhere)
    other = ValueError("boom")
    assert translate(other, tiny_config(), tmp_path, lambda run: "") is other


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_which_errors_are_out_of_memory(error, is_memory):
    assert is_out_of_memory(error) == is_memory


def test_out_of_memory_is_one_sentence(images, tmp_path, monkeypatch):
    def greedy(*args, **kwargs):
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(train_module, "accumulate_gradients", greedy)
    with pytest.raises(ResourceError) as caught:
        run(images, tmp_path)
    text = str(caught.value)
    assert "batch of 4 images a process = 16 crops" in text and "allocate" in text and "\n" not in text
    assert "train.batch_size_per_gpu to 2 with optim.accumulation_steps=2" in text
    assert text in (tmp_path / "logs" / "log.txt").read_text()
    assert describe_memory(tiny_config("train.batch_size_per_gpu=1"), MemoryError()).count("MemoryError") == 1
    space = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.00 GiB is free"
    full = torch.OutOfMemoryError(f"CUDA out of memory. {space}. Including non-PyTorch memory, this process has")
    assert f"got none ({space});" in describe_memory(tiny_config(), full)


def test_a_full_disk_hides_neither_the_error_that_ends_a_run_nor_a_hang(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    watch = Watch(tmp_path, hang_s=0)
    with pytest.raises(KeyError, match="the real one"), watch:
        monkeypatch.setattr(Ranks, "write", full)
        raise KeyError("the real one")
    ended = []
    monkeypatch.setattr("dinov2_custom.train.ranks.append_to_main_log", full)
    monkeypatch.setattr(os, "_exit", ended.append)
    watch._ended.clear()
    watch._end("rank 0 hangs")
    assert ended == [75]
    assert capsys.readouterr().err == "error: rank 0 hangs (not in the log: No space left on device)\n"
