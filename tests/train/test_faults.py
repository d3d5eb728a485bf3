"""Real processes that die, hang or run out of memory, and leave their stacks or traceback in the logs."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from dinov2_custom.errors import LostProcessError, ResourceError
from dinov2_custom.train import faults
from dinov2_custom.train import train as train_module
from dinov2_custom.train.faults import Watchdog, describe_memory, is_out_of_memory, translate
from tests.processes import Job, state, wait_until
from tests.processes import run as run_script
from tests.train.batches import TINY, tiny_config
from tests.train.test_step_guard import run
from tests.train.test_train import write_images

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from dinov2_custom import entry
from dinov2_custom.train import faults, train
faults.GRACE_S = 3.0
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
                    log = Path(sys.argv[-1]) / "logs" / "log.txt"
                    log.rename(log.with_name("former"))
                    os.mkfifo(log)
                    open(log, "w")  # opened for reading by nobody
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
    ("fault", "rank", "code", "expected"),
    [
        ("raise", 1, 1, {"log.txt": ["rank 1] Traceback (most recent call last)", "RuntimeError: boom in the loader"]}),
        ("kill", 1, -9, {"log.txt": ["expected all 2 processes, got a broken connection"]}),
        ("sleep", 1, 75, {"log.txt": ["rank 1] no step for 3 s"], "log.txt.rank1": ["thread 0x", "with_fault"]}),
        ("stop", 0, -9, {"log.txt": ["rank 1] no step for 3 s"], "log.txt.rank1": ["thread 0x", "parallel.py"]}),
    ],
)
def test_a_lost_or_hanging_process_ends_the_job_and_leaves_its_reason(images, tmp_path, fault, rank, code, expected):
    (tmp_path / "faulty.py").write_text(SCRIPT)
    arguments = [f"train.dataset_path={images}", *TINY, "train.num_workers=0", "train.hang_timeout=3"]
    arguments += ["train.max_steps=1000", "--output-dir", str(tmp_path / "out")]
    job = Job(str(tmp_path / "faulty.py"), fault, str(rank), *arguments, processes=2)
    assert job.wait() != 0
    for name, texts in expected.items():
        log = (tmp_path / "out" / "logs" / name).read_text()
        assert all(text in log for text in texts), log
    assert job.processes[rank].exitcode == code
    if fault in ("sleep", "stop"):
        assert 75 in [process.exitcode for process in job.processes]


def alone(images, tmp_path, fault):
    (tmp_path / "faulty.py").write_text(SCRIPT)
    arguments = [f"train.dataset_path={images}", *TINY, "train.num_workers=0", "train.hang_timeout=2"]
    done = run_script(str(tmp_path / "faulty.py"), fault, "0", *arguments, "--output-dir", str(tmp_path / "o"))
    assert done.returncode == 75 and "Traceback" not in done.stderr
    return done.stderr


def test_a_single_process_leaves_its_stacks(images, tmp_path):
    said = alone(images, tmp_path, "sleep")
    log = tmp_path / "o" / "logs" / "log.txt"
    assert "error: rank 0: no step for 2 s (train.hang_timeout) at iteration=2" in said and str(log) in said
    assert "most recent call first" in log.read_text() and "with_fault" in log.read_text()


def test_a_file_system_that_does_not_answer_ends_the_job_too(images, tmp_path):
    """Training and report block in an open() that never returns, as on a mount whose server is gone."""
    said = alone(images, tmp_path, "mount")
    assert said.count("\n") == 1 and "error: rank 0: no step for 2 s (train.hang_timeout) at iteration=2" in said


@pytest.fixture
def ended(monkeypatch):
    """Record the exit code of the process."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def test_a_running_process_is_not_ended(tmp_path, ended):
    with Watchdog(tmp_path, hang_s=1.0) as watchdog:
        for iteration in range(40):
            watchdog.mark(iteration)
            time.sleep(0.05)
    assert not ended and not (tmp_path / "logs").exists()


def test_a_step_that_ends_after_the_report_was_slow(tmp_path, ended, monkeypatch):
    reports = []
    monkeypatch.setattr(faults, "GRACE_S", 1000.0)

    def report(watchdog, what):  # the step ends while the thread waits for the other reports
        reports.append((watchdog.iteration, what))
        watchdog.mark(watchdog.iteration + 1)

    monkeypatch.setattr(Watchdog, "_report", report)
    with Watchdog(tmp_path, hang_s=0.2) as watchdog:
        watchdog.mark(0)
        watchdog.mark(1)
        wait_until(lambda: len(reports) >= 3, "three slow steps")
    assert [iteration for iteration, _ in reports[:3]] == [1, 2, 3] and not ended


def test_time_in_which_the_system_holds_the_process_does_not_count(tmp_path, ended, monkeypatch):
    ahead_s = [0.0]
    monkeypatch.setattr(faults, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s[0]))
    with Watchdog(tmp_path, hang_s=3) as watchdog:
        watchdog.mark(0)
        watchdog.mark(1)
        ahead_s[0] = 1000.0
        time.sleep(1.2)  # the rest of the step, for several checks
    assert not ended and not (tmp_path / "logs").exists()


@pytest.fixture
def peer():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield process
    process.kill()
    process.wait()


def with_peer(monkeypatch, tmp_path, process, hang_s=0):
    """Return the watchdog of rank 0, with ``process`` as rank 1 on this machine."""
    monkeypatch.setattr(faults.distributed, "gather_objects", lambda mine: [mine, (mine[0], process.pid)])
    monkeypatch.setattr(faults, "LOOK_S", 0.02)
    monkeypatch.setattr(faults, "GRACE_S", 0.2)
    return Watchdog(tmp_path, hang_s)


def test_a_dead_local_process_ends_the_others_without_a_timeout(
    monkeypatch, tmp_path, peer, ended, capsys
):
    """No connection is broken, as when nccl waits for it."""
    with with_peer(monkeypatch, tmp_path, peer) as watchdog:
        watchdog.mark(7)
        time.sleep(0.5)
        assert not ended
        peer.kill()
        wait_until(lambda: ended, "the end")
    said = f"rank 1 (pid {peer.pid}) has ended, possibly killed because memory ran out (see dmesg) at iteration=7"
    assert ended[0] == 75 and said in capsys.readouterr().err
    assert said in (tmp_path / "logs" / "log.txt").read_text()


def test_a_stopped_process_is_killed(monkeypatch, tmp_path, peer, ended):
    """No launcher's SIGTERM would end it."""
    peer.send_signal(signal.SIGSTOP)
    wait_until(lambda: state(peer.pid) == "T", "the stop")
    with with_peer(monkeypatch, tmp_path, peer, hang_s=0.2):
        wait_until(lambda: ended, "the end")
    assert ended[0] == 75 and peer.wait() == -signal.SIGKILL


def test_a_suspended_job_continues(images, tmp_path):
    """All processes are suspended for longer than the timeout, as by ``scontrol suspend``, and resumed."""
    (tmp_path / "slow.py").write_text(SCRIPT)
    arguments = [f"train.dataset_path={images}", *TINY, "train.num_workers=0", "train.hang_timeout=4"]
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
    lost = translate(broken, tiny_config(), tmp_path)
    assert isinstance(lost, LostProcessError) and lost.exit_code == 75
    assert "(Connection closed by peer [127.0.0.1]:1)" in str(lost) and str(tmp_path / "logs") in str(lost)
    assert "rank 1] expected all 3 processes" in (tmp_path / "logs" / "log.txt").read_text()
    other = ValueError("boom")
    assert translate(other, tiny_config(), tmp_path) is other


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
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
    assert "batch of 4 images per process = 16 crops" in text and "allocate" in text and "\n" not in text
    assert "train.batch_size_per_gpu to 2 with optim.accumulation_steps=2" in text
    assert text in (tmp_path / "logs" / "log.txt").read_text()
    assert describe_memory(tiny_config("train.batch_size_per_gpu=1"), MemoryError()).count("MemoryError") == 1
    space = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.00 GiB is free"
    full = torch.OutOfMemoryError(f"CUDA out of memory. {space}. Including non-PyTorch memory, this process has")
    assert f"got none ({space});" in describe_memory(tiny_config(), full)


def test_a_full_disk_keeps_no_hanging_process_alive(tmp_path, monkeypatch, ended, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.txt").symlink_to("/dev/full")
    monkeypatch.setattr(faults, "GRACE_S", 0.2)
    with Watchdog(tmp_path, hang_s=0.2):
        wait_until(lambda: ended, "the end")
    assert ended[0] == 75 and "error: rank 0: no step for 0.6 s" in capsys.readouterr().err
