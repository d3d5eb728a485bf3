"""Real processes, really stopped: Ctrl-C, SIGTERM to the whole group, kill -9; then resumed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train.batches import TINY
from tests.train.test_train import rows, weights, write_images

REPOSITORY = Path(__file__).resolve().parents[2]
TOTAL = 40


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


def start(images: Path, out: Path, total: int = TOTAL) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    log = open(out.parent / f"{out.name}.log", "a")
    with log:
        return subprocess.Popen(command(images, out, total), env=env, stdout=log, stderr=log, start_new_session=True)


def wait_for_checkpoint(process: subprocess.Popen, out: Path) -> None:
    deadline = time.monotonic() + 120
    while not (out / "last_checkpoint").exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(images, out).wait(timeout=240) == 0
    return out


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(images, uninterrupted, tmp_path, signum, code):
    out = tmp_path / "out"
    process = start(images, out)
    wait_for_checkpoint(process, out)
    os.killpg(process.pid, signum)
    assert process.wait(timeout=60) == code
    assert not (out / "model_final.pth").exists()

    assert start(images, out).wait(timeout=240) == 0
    log = (tmp_path / "out.log").read_text()
    assert "resumed from=" in log and "Traceback" not in log
    expected, got = weights(uninterrupted), weights(out)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    written = [row["iteration"] for row in rows(out)]
    assert written == sorted(set(written)) and written[-1] == TOTAL - 1


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
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_an_error_is_told_once_and_kept_in_the_log(images, uninterrupted):
    other = [*command(images, uninterrupted), "student.arch=vit_micro", "optim.epochs=2"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(other, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("another architecture") == 1
    assert "another architecture" in (uninterrupted / "logs" / "log.txt").read_text()
