"""The files by which processes know of each other: who is gone, and one word at the end, however many speak."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2_custom.train.ranks import Ranks, describe_lost, has_ended, is_stopped, process
from dinov2_custom.train.watch import Watch

REPOSITORY = Path(__file__).resolve().parents[2]
TELL = """
import sys, time
from pathlib import Path
from dinov2_custom.train import ranks
run, rank, ranks.TELL_S = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
append = ranks.append_to_main_log

def slowly(*args):
    time.sleep(0.5)
    append(*args)

ranks.append_to_main_log = slowly
(run / f"ready{rank}").touch()
while len(list(run.glob("ready*"))) < 3:
    time.sleep(0.01)
ranks.Ranks(run, rank, "job").tell_once("it is over")
sys.exit("it is over" not in (run / "logs" / "log.txt").read_text())
"""


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    yield process
    process.kill()
    process.wait()


def write_as(run, child, rank, **state):
    """Write the file that ``child`` would as ``rank`` of the job of this process."""
    job = Ranks(run, rank, "job")
    job.identity |= {"pid": child.pid, "started": process(child.pid)[1]}
    job.write(state)
    return job.read(rank)


def test_who_is_gone_is_read_from_the_files(tmp_path, child):
    assert describe_lost(tmp_path) is None  # nothing can be known yet
    own = Ranks(tmp_path, 0, "job")
    own.clear()
    own.write({})
    assert describe_lost(tmp_path) == ""  # this very process
    state = write_as(tmp_path, child, 3)
    assert describe_lost(tmp_path) == "" and not has_ended(state)
    assert not has_ended({**state, "machine": "another"}) and has_ended({**state, "started": "1"})
    write_as(tmp_path, child, 3, died="KeyError: 'gone'")
    assert "rank 3" in describe_lost(tmp_path) and "ended with KeyError: 'gone'" in describe_lost(tmp_path)
    write_as(tmp_path, child, 3)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, not buried
    assert "is gone without a word" in describe_lost(tmp_path)
    child.wait()
    assert "is gone without a word" in describe_lost(tmp_path)
    own.tell_once("rank 3 hangs")
    assert describe_lost(tmp_path) == "rank 3 hangs"  # what the job says of it


def test_an_earlier_job_in_the_run_directory_does_not_count(tmp_path, child):
    Ranks(tmp_path, 0, "earlier").clear()
    job = Ranks(tmp_path, 1, "earlier")
    job.write({"died": "boom"})
    job.tell_once("rank 1 hangs")
    own = Ranks(tmp_path, 0, "job")
    own.write({})
    assert own.read(1) == {} and describe_lost(tmp_path) == ""
    with Watch(tmp_path, hang_s=0):
        assert [path.name for path in own.folder.iterdir()] == ["rank0"]


def test_a_watch_that_ends_with_an_error_leaves_its_last_words(tmp_path):
    with pytest.raises(KeyError), Watch(tmp_path, hang_s=0):
        raise KeyError("gone")
    assert json.loads((tmp_path / "logs" / "ranks" / "rank0").read_text())["died"] == "KeyError: 'gone'"


def test_stopped_is_told_from_gone(tmp_path, child):
    Ranks(tmp_path, 0, "job").clear()
    state = write_as(tmp_path, child, 1)
    assert not is_stopped(state)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert is_stopped(state) and not has_ended(state) and not is_stopped({**state, "machine": "another"})


@pytest.mark.parametrize("teller_is_dead", [False, True])
def test_nobody_leaves_before_the_end_of_a_job_is_in_the_log(tmp_path, teller_is_dead):
    """Three real processes at once; or a fourth one was about to say it and died."""
    job = Ranks(tmp_path, 0, "job")
    job.clear()
    if teller_is_dead:
        (job.folder / "end_job").touch()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", TELL, str(tmp_path)]
    patience_s = "0.2" if teller_is_dead else "100"
    jobs = [subprocess.Popen([*command, str(rank), patience_s], env=env) for rank in range(3)]
    assert [job.wait(timeout=600) for job in jobs] == [0, 0, 0]
    said = (tmp_path / "logs" / "log.txt").read_text().count("it is over")
    assert said >= 1 if teller_is_dead else said == 1
