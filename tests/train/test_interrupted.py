"""Real processes stopped by Ctrl-C, SIGTERM to the whole group or kill -9, and resumed."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2_custom.utils.weights import read_weights
from tests.processes import ENVIRONMENT, REPOSITORY, Job, children, run, running, torchrun, wait_until
from tests.train.batches import TINY
from tests.train.test_train import rows, weights, write_images

TOTAL = 40
STOPS = [  # SIGUSR1: see the test of two processes
    (signal.SIGINT, 130),
    (signal.SIGTERM, 143),
    (signal.SIGUSR2, 140),
    (signal.SIGKILL, -9),
]


def command(images: Path, out: Path, total: int = TOTAL) -> list[str]:
    overrides = [
        f"train.dataset_path={images}",
        f"train.OFFICIAL_EPOCH_LENGTH={total}",
        "optim.epochs=1",
        "optim.warmup_epochs=0.25",
        "train.num_workers=1",
        "train.log_every=1",
        "checkpointing.period=2",
        "student.drop_path_rate=0.3",
    ]
    return [sys.executable, str(REPOSITORY / "run/train/train.py"), "--output-dir", str(out), *TINY, *overrides]


def start(images: Path, out: Path, total: int = TOTAL) -> Job:
    return Job(*command(images, out, total)[1:], log=out.parent / f"{out.name}.log")


def wait_for_checkpoint(process: Job | subprocess.Popen, out: Path) -> None:
    wait_until((out / "last_checkpoint").exists, "a checkpoint", [process])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(images, out).wait() == 0
    return out


@pytest.mark.parametrize(("signum", "code"), STOPS)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(images, uninterrupted, tmp_path, signum, code):
    out = tmp_path / "out"
    process = start(images, out)
    wait_for_checkpoint(process, out)
    os.killpg(process.pid, signum)
    assert process.wait() == code
    assert not (out / "model_final").exists()
    if code > 0:  # saved after the step, whose row is there too
        stopped_after = read_weights(out / (out / "last_checkpoint").read_text())["iteration"]
        assert rows(out)[-1]["iteration"] == stopped_after

    assert start(images, out).wait() == 0
    log = (tmp_path / "out.log").read_text()
    assert "resumed from=" in log and "Traceback" not in log
    expected, got = weights(uninterrupted), weights(out)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert [row["iteration"] for row in rows(out)] == list(range(TOTAL))


def test_a_signal_to_one_of_two_processes_stops_both_after_a_save(images, tmp_path):
    out = tmp_path / "out"
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(torchrun(2, *command(images, out)[1:]), env=os.environ | ENVIRONMENT, **options)
    wait_for_checkpoint(launcher, out)
    pid = int((out / "logs" / "log.txt.rank1").read_text().split()[2])
    os.kill(pid, signal.SIGUSR1)
    _, errors = launcher.communicate(timeout=600)
    assert "exitcode  : 138" in errors and "dinov2_custom/" not in errors, errors
    for name in ("log.txt", "log.txt.rank1"):
        assert "stopped after iteration=" in (out / "logs" / name).read_text()
    saved = read_weights(out / (out / "last_checkpoint").read_text())["iteration"]
    assert rows(out)[-1]["iteration"] == saved < TOTAL - 1


def test_ctrl_c_while_libraries_are_loaded_leaves_no_traceback(tmp_path):
    slow = tmp_path / "slow_library.py"
    slow.write_text("import time\nprint('loading', flush=True)\ntime.sleep(1000)\n")
    script = "import sys\nfrom dinov2_custom import entry\nsys.exit(entry.run('slow_library', None))"
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{tmp_path}"}
    options = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], **options)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=600)[1] == "stopped by Ctrl-C\n" and process.returncode == 130


def test_ctrl_c_before_the_first_step_leaves_no_traceback(images, tmp_path):
    started = tmp_path / "started"
    script = (
        "import sys, time, pathlib\nfrom dinov2_custom import entry\nimport dinov2_custom.train.train as t\n"
        f"def slow(*a, **k): pathlib.Path({str(started)!r}).touch(); time.sleep(1000)\n"
        "t.make_train_loader = slow\n"
        "sys.exit(entry.run('dinov2_custom.train.train', t.get_args_parser().parse_args()))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    arguments = [sys.executable, "-c", script, *command(images, tmp_path / "out")[2:]]
    process = subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True)
    wait_until(started.exists, "the first step", [process])
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=600)[1] == "stopped by Ctrl-C\n" and process.returncode == 130


def test_killed_at_three_random_moments(images, uninterrupted, tmp_path):
    from tests.train.kill_and_resume import differing, survive

    records = survive(images, tmp_path / "out", kills=3, rng=random.Random(1), total=TOTAL)
    assert differing(uninterrupted, tmp_path / "out") == []
    assert records  # a fast machine may finish before the third kill, never before the first


def test_the_command_prints_one_line_of_error_and_no_traceback(tmp_path):
    done = subprocess.run(
        command(tmp_path / "absent", tmp_path / "out"),
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_an_error_is_printed_once_and_kept_in_the_log(images, uninterrupted):
    other = [*command(images, uninterrupted), "student.arch=vit_micro", "optim.epochs=2"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(other, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("another architecture") == 1
    assert "another architecture" in (uninterrupted / "logs" / "log.txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends children with their parent on Linux")
def test_a_killed_run_leaves_no_process_and_no_lock(images, tmp_path):
    out = tmp_path / "out"
    process = start(images, out, total=10_000)
    wait_for_checkpoint(process, out)
    workers = children(process)
    assert workers
    for worker in workers:  # like a worker that waits for a network disk and cannot react
        os.kill(worker, signal.SIGSTOP)
    process.kill()
    process.wait()
    again = start(images, out, total=10_000)
    try:
        newest = (out / "last_checkpoint").read_text()
        wait_until(lambda: (out / "last_checkpoint").read_text() != newest, "a checkpoint of the second run", [again])
        assert not running(workers)
    finally:
        again.kill()
        again.wait()


def test_a_folder_whose_name_is_not_utf_8_is_trained_on_resumed_and_embedded(tmp_path):
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    images = write_images(named / "images", 6)
    out = named / "out"
    for total in (2, 4):
        process = start(images, out, total)
        assert process.wait() == 0, (named / "out.log").read_text(errors="replace")[-2000:]
    done = run("run/embed.py", str(out), str(images), "--output-dir", str(named / "features"))
    assert done.returncode == 0, done.stderr
    assert len(rows(out)) == 4
