"""When a job is worth another attempt. The real requeues are in tests/slurm."""

import pytest

from dinov2_custom.run import outcome
from dinov2_custom.run.outcome import Outcome
from dinov2_custom.run.requeue import Job, causes, decide, describe_job

SHOWN = "JobId=7 JobName=dinov2:train\n   JobState=RUNNING Reason=None\n   StartTime=Unknown EndTime={} Deadline=N/A\n"


def ended(*kinds_and_codes):
    return [Outcome(rank, kind, code) for rank, (kind, code) in enumerate(kinds_and_codes)]


LATE = Job(seconds_left=100)


@pytest.mark.parametrize(
    "outcomes, progressed, job, again, why",
    [
        (ended(("done", 0), ("done", 0)), True, Job(), False, "complete"),
        (ended(("stopped", 143), ("stopped", 143)), True, Job(), True, "after a save"),
        (ended(("stopped", 140)), True, LATE, True, "after a save"),
        (ended(("stopped", 140)), False, LATE, False, "too short"),
        (ended(("stopped", 140)), False, Job(), True, "signal"),
        (ended(("stopped", 143)), True, Job("CANCELLED"), False, "cancelled"),
        (ended(("stopped", 143)), True, Job("TIMEOUT"), False, "timeout"),
        (ended(("stopped", 143)), True, Job("COMPLETING"), False, "completing"),
        (ended(("stopped", 130)), True, Job(), False, "by hand"),
        (ended(("refused", 1)), True, Job(), False, "meet again"),
        (ended(("crashed", 1)), True, Job(), True, "goes on from"),
        (ended(("crashed", 1)), False, Job(), False, "crashed before"),
        (ended(("lost", 75)), True, Job(), True, "goes on from"),
        ([], True, Job(), True, "goes on from"),
        ([], False, Job(), False, "killed before"),
        (ended(("crashed", 1), ("refused", 1)), True, Job(), False, "meet again"),
    ],
)
def test_decisions(outcomes, progressed, job, again, why):
    decided, reason = decide(outcomes, max(len(outcomes), 1), progressed, job)
    assert decided is again and why in reason


def test_stopped_by_srun_because_another_one_died_is_no_stop():
    assert decide(ended(("stopped", 143)), 2, False, Job()) == (
        False,
        "a process was killed before there was a checkpoint",
    )
    assert decide(ended(("stopped", 143)), 2, True, Job()) == (True, "it died, and goes on from its last checkpoint")


def test_reading_what_slurm_says():
    import time

    now = time.mktime(time.strptime("2026-01-01T10:00:00", "%Y-%m-%dT%H:%M:%S"))
    assert describe_job(SHOWN.format("2026-01-01T10:01:40"), now) == Job("RUNNING", 100.0)
    assert describe_job(SHOWN.format("Unknown"), now).seconds_left == float("inf")
    assert describe_job("", now).state == "UNKNOWN"


def test_outcomes_on_disk(tmp_path):
    for one in (Outcome(1, "crashed", 1, "text\n'\""), Outcome(0, "done", 0)):
        outcome.write(one, tmp_path)
    (tmp_path / "rank2.json").write_text('{"rank": 2, "ki')
    assert outcome.read(tmp_path) == [Outcome(0, "done", 0), Outcome(1, "crashed", 1, "text\n'\"")]


def test_the_job_log_names_each_cause_once():
    refused = [Outcome(rank, "refused", 1, "expected images, got none") for rank in range(2)]
    assert causes(refused, 2, "run/7") == ["error: expected images, got none"]
    crashed = [Outcome(0, "lost", 75), Outcome(1, "crashed", 1, "Traceback\n  line\nRuntimeError: no such kernel\n")]
    assert causes(crashed, 2, "run/7") == [
        "error: rank 1: RuntimeError: no such kernel; the traceback: run/7_1_log.err"
    ]
    (killed,) = causes([Outcome(1, "stopped", 143)], 3, "run/7")
    assert "rank 0, 2; what was printed: run/7_0_log.err" in killed
    assert causes(ended(("done", 0), ("stopped", 143)), 2, "run/7") == []
