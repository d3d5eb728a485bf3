"""When a job should be requeued; tests/slurm has real requeues."""

import os
import pickle

import pytest

from dinov2_custom.run.requeue import AGAIN, Job, causes, decide, describe_job, main, read

SHOWN = "JobId=7 JobName=dinov2:train\n   JobState=RUNNING Reason=None\n   StartTime=Unknown EndTime={} Deadline=N/A\n"


def ended(*values):
    """Return results by rank: an exit code, or the text of an error."""
    return {rank: ("error" if isinstance(value, str) else "success", value) for rank, value in enumerate(values)}


LATE = Job(seconds_left=100)
CRASH = "Traceback (most recent call last):\n  line\nRuntimeError: no such kernel\n"
REFUSED = "expected images, got none"


@pytest.mark.parametrize(
    "results, progressed, job, again, why",
    [
        (ended(0, 0), True, Job(), False, "complete"),
        (ended(143, 143), True, Job(), True, "after a save"),
        (ended(140), True, LATE, True, "after a save"),
        (ended(140), False, LATE, False, "too short"),
        (ended(140), False, Job(), True, "signal"),
        (ended(143), True, Job("CANCELLED"), False, "cancelled"),
        (ended(143), True, Job("TIMEOUT"), False, "timeout"),
        (ended(143), True, Job("COMPLETING"), False, "completing"),
        (ended(130), True, Job(), False, "by the user"),
        (ended(REFUSED), True, Job(), False, "another attempt would repeat"),
        (ended(3, 3), True, Job(), False, "another attempt would repeat"),  # train.on_collapse=stop
        (ended(1), True, Job(), False, "another attempt would repeat"),
        (ended(CRASH), True, Job(), True, "it died; the next attempt resumes from"),
        (ended(CRASH, 143), True, Job(), True, "it died; the next attempt resumes from"),
        (ended(CRASH), False, Job(), False, "crashed before"),
        (ended(75), True, Job(), True, "it died; the next attempt resumes from"),
        (ended(75, 143), True, Job(), True, "it died; the next attempt resumes from"),
        ({}, True, Job(), True, "it died; the next attempt resumes from"),
        ({}, False, Job(), False, "killed before"),
        (ended(CRASH, REFUSED), True, Job(), False, "another attempt would repeat"),
    ],
)
def test_decisions(results, progressed, job, again, why):
    decided, reason = decide(results, max(len(results), 1), progressed, job)
    assert decided is again and why in reason


def test_stop_by_srun_after_a_death_is_not_a_regular_stop():
    assert decide(ended(143), 2, False, Job()) == (False, "a process was killed before there was a checkpoint")
    assert decide(ended(143), 2, True, Job()) == (True, "it died; the next attempt resumes from its last checkpoint")


def test_slurm_output_is_parsed():
    import time

    now = time.mktime(time.strptime("2026-01-01T10:00:00", "%Y-%m-%dT%H:%M:%S"))
    assert describe_job(SHOWN.format("2026-01-01T10:01:40"), now) == Job("RUNNING", 100.0)
    assert describe_job(SHOWN.format("Unknown"), now).seconds_left == float("inf")
    assert describe_job("", now).state == "UNKNOWN"


class Touch:
    """Call ``os.mkdir(path)`` when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write(folder, rank, value, mode=0o600):
    path = folder / f"7_{rank}_result.pkl"
    path.write_bytes(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    path.chmod(mode)


def test_results_writable_by_others_are_ignored(tmp_path):
    job_files = str(tmp_path / "7")
    write(tmp_path, 0, ("success", 140))
    write(tmp_path, 11, ("error", "text\n'"), mode=0o644)
    write(tmp_path, 2, ("success", 0), mode=0o602)
    write(tmp_path, 3, ("success", 0), mode=0o620)
    write(tmp_path, 4, ("success", Touch(tmp_path / "called")))
    write(tmp_path, 5, Touch(tmp_path / "called"))
    (tmp_path / "7_6_result.pkl").write_bytes(b"\x80\x05torn")
    (tmp_path / "7_7_result.pkl.save_tmp").touch()
    assert read(job_files) == {0: ("success", 140), 11: ("error", "text\n'")}
    assert not (tmp_path / "called").exists()
    if not os.getuid():
        os.chown(tmp_path / "7_0_result.pkl", 12345, -1)
        assert 0 not in read(job_files)


@pytest.mark.parametrize(
    "checked, code, code_of_all, marker, says",
    [
        ("0", "0", AGAIN, "before", "requeued: stopped after a save"),
        ("0", "0", AGAIN, "now", "requeued: stopped by a signal"),
        ("143", "143", AGAIN, "now", "requeued: stopped by a signal"),  # in the check of the environment
    ],
)
def test_exit_code_informs_the_batch_script(
    tmp_path, monkeypatch, capsys, checked, code, code_of_all, marker, says
):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    (tmp_path / "last_checkpoint").write_text("now\n")
    if checked == "0":
        write(tmp_path, 0, ("success", 140))
    arguments = [str(tmp_path), str(tmp_path / "7"), marker, checked, code, SHOWN.format("Unknown")]
    assert main(arguments) == code_of_all and says in capsys.readouterr().out
    arguments[-1] = arguments[-1].replace("RUNNING", "CANCELLED")
    assert main(arguments) != AGAIN and "ended from outside: SLURM reports cancelled" in capsys.readouterr().out
    (tmp_path / "last_checkpoint").write_bytes(b"\xff")  # torn: no new checkpoint
    assert main([*arguments[:-1], SHOWN.format("Unknown")]) == AGAIN
    assert "requeued: stopped by a signal" in capsys.readouterr().out


def test_the_job_log_names_each_cause_once():
    assert causes(ended(REFUSED, REFUSED), 2, "run/7") == [f"error: {REFUSED}"]
    assert causes(ended(75, CRASH), 2, "run/7") == [
        "error: rank 1: RuntimeError: no such kernel; the traceback: run/7_1_log.err"
    ]
    (killed,) = causes({1: ("success", 143)}, 3, "run/7")
    assert "rank 0, 2; what was printed: run/7_0_log.err" in killed
    assert causes(ended(0, 143), 2, "run/7") == []
    for advice in ("crashing", "hanging or bugs in the application"):
        gloos = f"Connection closed by peer [n1]:10141. This is typically caused by a remote worker {advice}. GLHF!"
        (line,) = causes(ended(f"Traceback (most ...):\nRuntimeError: [/w/gloo/tcp/pair.cc:553] {gloos}\n"), 1, "run/7")
        said = "error: rank 0: RuntimeError: Connection closed by peer [n1]:10141; the traceback:"
        assert line.startswith(said), "without torch's source file and advice"
