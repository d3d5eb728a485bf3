"""The local launcher with real processes: ranks, signals, process deaths and output files."""

import argparse
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dinov2_custom.errors import COLLAPSED, LaunchError
from dinov2_custom.run import local
from dinov2_custom.utils.weights import read_weights
from tests.processes import ENVIRONMENT, REPOSITORY, children, running, wait_until
from tests.run.tasks import Listen, Misbehave
from tests.train.batches import TINY
from tests.train.test_train import write_images

TOTAL = 100  # it collapses at the tenth row, of iteration 36


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 12)


def command(images: Path, out: Path, *flags: str) -> list[str]:
    overrides = [
        f"train.dataset_path={images}",
        f"train.OFFICIAL_EPOCH_LENGTH={TOTAL}",
        "optim.epochs=1",
        "optim.warmup_epochs=0.25",
        "train.num_workers=0",
        "train.log_every=4",
        "checkpointing.period=10",
        "teacher.teacher_temp=100",
        "teacher.warmup_teacher_temp=100",
        "train.on_collapse=stop",
    ]
    script = str(REPOSITORY / "run/train/train.py")
    return [sys.executable, script, "--ngpus", "2", "--output-dir", str(out), *flags, *TINY, *overrides]


def start(images: Path, out: Path, *flags: str) -> subprocess.Popen:
    environment = os.environ | ENVIRONMENT
    with open(out.parent / f"{out.name}.log", "a") as log:
        return subprocess.Popen(
            command(images, out, *flags), env=environment, stdout=log, stderr=log, start_new_session=True
        )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    wait_until(path.exists, str(path), [process])


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(images, out).wait(timeout=600) == COLLAPSED
    return out


def test_two_processes_are_one_run_that_ends_when_it_has_collapsed(uninterrupted):
    log, printed = (uninterrupted / "logs/log.txt").read_text(), uninterrupted.with_name("whole.log").read_text()
    assert log.count("world_size=2") == 1  # nothing has restarted it
    for text in (log, printed):
        *_, verdict, end = text.splitlines()
        assert text.count("verdict uniform: ") == 2 and "verdict uniform: " in verdict
        assert "stopped after iteration=3" in end and text.count("stopped after iteration=") == 1
    assert "verdict uniform: " not in (uninterrupted / "logs/log.txt.rank1").read_text()
    assert children_are_gone(uninterrupted) and (uninterrupted / "local_1_log.out").exists()
    assert not (uninterrupted / "local_0_log.out").exists(), "rank 0 keeps the terminal"
    assert "Training" in printed


def test_ctrl_c_saves_and_the_same_command_resumes_bit_for_bit(images, uninterrupted, tmp_path):
    out = tmp_path / "out"
    process = start(images, out)
    wait_for(out / "last_checkpoint", process)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C on a terminal does
    assert process.wait(timeout=600) == 130
    assert not (out / "model_final").exists() and children_are_gone(out)

    assert start(images, out).wait(timeout=600) == COLLAPSED
    log = (tmp_path / "out.log").read_text()
    assert "resumed from=" in log and "Traceback" not in log
    expected, got = (read_weights(run / (run / "last_checkpoint").read_text())["model"] for run in (uninterrupted, out))
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def children_are_gone(out: Path) -> bool:
    mine = str(out).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mine in path.read_bytes():
                return False
        except OSError:
            continue
    return True


def test_a_killed_rank_ends_the_run_with_a_sentence(images, tmp_path):
    out = tmp_path / "out"
    process = start(images, out)
    wait_for(out / "last_checkpoint", process)
    second = next(pid for pid in children(process) if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(second, signal.SIGKILL)
    assert process.wait(timeout=600) == 137
    sentence = "rank 1 was killed by SIGKILL, the other processes were stopped"
    assert sentence in (tmp_path / "out.log").read_text()
    assert sentence in (out / "logs" / "log.txt").read_text()
    assert children_are_gone(out)


def test_error_is_reported_once_and_leaves_no_files(tmp_path):
    out = tmp_path / "runs" / "out"
    out.parent.mkdir()
    process = start(tmp_path / "absent", out)
    assert process.wait(timeout=600) == 1
    log = (tmp_path / "runs" / "out.log").read_text()
    assert log.count("error: ") == 1 and "Traceback" not in log
    assert not out.exists()


def launch(how: str, out: Path, who: int = 1, wait: bool = True) -> int:
    return local.launch(Misbehave, argparse.Namespace(output_dir=str(out), how=how, who=who, wait=wait), processes=3)


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


def test_the_cores_that_may_be_used_are_shared(importable, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)  # as in an allocation
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch("0", tmp_path / "out", wait=False) == 0
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_every_rank_gets_its_rank_and_world_size(importable, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    assert launch("0", tmp_path / "out", wait=False) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    assert [(tmp_path / "out" / f"rank{r}").read_text() for r in range(3)] == ["3 0", "3 1", "3 2"]
    assert (tmp_path / "out" / "local_2_log.out").read_text() == "hello from rank 2\n"


def test_a_crash_is_in_the_main_log_with_its_traceback(importable, tmp_path, capfd):
    assert launch("crash", tmp_path / "out") == 1
    log = (tmp_path / "out" / "logs" / "log.txt").read_text()
    assert "rank 1 ended with this error:\nTraceback" in log and "ValueError: an unexpected value" in log
    assert "rank 1 ended with exit code 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    "how, told", [("refuse", "no such images"), ("no torch", "expected torch in the environment of")]
)
def test_error_of_another_rank_is_reported(importable, tmp_path, capfd, how, told):
    assert launch(how, tmp_path / "out") == 1
    error = capfd.readouterr().err
    assert error.count(f"error: {told}") == 1 and "Traceback" not in error


@pytest.mark.parametrize("how, code", [("kill", 137), ("75", 75), ("140", 140)])
def test_exit_codes_pass_through(importable, tmp_path, capfd, how, code):
    assert launch(how, tmp_path / "out", who=0, wait=code != 140) == code
    assert ("was killed by SIGKILL" in capfd.readouterr().err) == (how == "kill")


def test_rendezvous_is_on_loopback_and_ignores_shell_variables(importable, monkeypatch, tmp_path):
    """Check the listening addresses of the launcher and ranks while all ranks are in a process group."""
    for name, value in {"RANK": "7", "WORLD_SIZE": "9", "LOCAL_RANK": "3", "MASTER_ADDR": "192.0.2.1"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"MASTER_PORT": "1", "SLURM_PROCID": "4", "PMI_RANK": "5", "PET_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    args = argparse.Namespace(output_dir=str(tmp_path / "out"))
    assert local.launch(Listen, args, processes=2) == 0
    assert {path.name: path.read_text() for path in (tmp_path / "out").glob("rank*")} == {
        "rank0": "2 127.0.0.1 ok",
        "rank1": "2 127.0.0.1 ok",
    }


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([75, -9], -9),  # noticed at once, the one that only lost the other first
        ([-9, 75], -9),
        ([1, -9], -9),
        ([-15, 75, 1], 1),
        ([-15, 75], 75),
        ([75, -15], 75),
        ([143, -15], 143),
    ],
)
def test_the_cause_of_several_failures(codes, expected):
    failures = [SimpleNamespace(exitcode=code, timestamp=when) for when, code in enumerate(codes)]
    assert local.by_cause(reversed(failures))[0].exitcode == expected


def test_torchrun_with_the_exit_code_of_the_cause(importable, tmp_path):
    """Run as on each of several nodes, without variables in the environment."""
    (tmp_path / "end.py").write_text("import os, sys\nsys.exit(7 if os.environ['RANK'] == '1' else 0)\n")
    flags = ["--nnodes=1", "--node-rank=0", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port()}"]
    command = [sys.executable, "-m", "dinov2_custom.run.local", *flags, str(tmp_path / "end.py")]
    assert subprocess.run(command).returncode == 7


def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_signal_reaches_every_rank_once(importable, tmp_path):
    out = tmp_path / "out"
    code = (
        "import argparse, sys; from dinov2_custom.run import local; from tests.run.tasks import CountSignals\n"
        f"sys.exit(local.launch(CountSignals, argparse.Namespace(output_dir={str(out)!r}), processes=2))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    wait_for(out / "ready0", process)
    wait_for(out / "ready1", process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=600) == 143
    assert [(out / f"signals{rank}").read_text() for rank in range(2)] == ["15", "15"]


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local.num_processes(argparse.Namespace(cpu=None, ngpus=None)) == 2
    with pytest.raises(LaunchError, match="at most the 2 GPUs of this machine, got 3"):
        local.num_processes(argparse.Namespace(cpu=None, ngpus=3))


def test_without_gpus_one_process_unless_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local.num_processes(argparse.Namespace(cpu=True, ngpus=None)) == 1
    assert local.num_processes(argparse.Namespace(cpu=True, ngpus=3)) == 3


def test_processes_without_their_launcher_save_and_end(images, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    process = start(images, tmp_path / "o", "train.max_steps=100000")
    wait_for(tmp_path / "o" / "last_checkpoint", process)
    ranks = children(process)
    assert len(ranks) == 2
    process.kill()
    process.wait()
    try:
        wait_until(lambda: not running(ranks), "the end of the ranks")
    finally:
        for pid in running(ranks):
            os.kill(pid, signal.SIGKILL)
    assert "stopped after iteration=" in (tmp_path / "o" / "logs" / "log.txt").read_text()
    left = {path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor_")}
    assert not left, "beside torch's cache"
