"""Real jobs: the files of a submitted training run, and identical results after every kind of interruption."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.processes import wait_until
from tests.train.batches import TINY
from tests.train.test_train import rows, weights

TOTAL = 40


def arguments(images: Path, out: object, *flags: object) -> list[object]:
    overrides = [
        f"train.dataset_path={images}",
        f"train.OFFICIAL_EPOCH_LENGTH={TOTAL}",
        "optim.epochs=1",
        "optim.warmup_epochs=0.25",
        "train.num_workers=1",
        "train.log_every=1",
        "checkpointing.period=6",
        "student.drop_path_rate=0.3",
    ]
    small = ["--cpu", "--ngpus", 2, "--cpus-per-task", 2, "--timeout", 10]
    return [*small, "--output-dir", out, *flags, *TINY, *overrides]


def last_checkpoint(out: Path) -> str:
    marker = out / "last_checkpoint"
    return marker.read_text() if marker.exists() else ""


def frozen_after_a_checkpoint(cluster, job: str, out: Path) -> dict[int, int]:
    """Wait for a newer checkpoint, stop all ranks where they are, and return {rank: process id}."""
    before = last_checkpoint(out)
    wait_until(lambda: last_checkpoint(out) not in ("", before), "a checkpoint")
    ranks = cluster.ranks(job)
    for pid in ranks.values():
        os.kill(pid, signal.SIGSTOP)
    return ranks


def wake(ranks: dict[int, int]) -> None:
    for pid in ranks.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def set_limit(cluster, job: str, minutes: int) -> None:
    """Set the time limit, retrying while SLURM rejects it because it is ending a job."""
    command = ("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    wait_until(lambda: cluster.run(*command, check=False).returncode == 0, "another time limit")


def preempt(cluster, job: str, out: Path) -> None:
    """Preempt the job by one of a higher partition: SLURM sends SIGTERM and, 25 s later, kills and requeues it.

    The ranks sleep until SLURM has decided, because the run might end earlier.
    """
    ranks = frozen_after_a_checkpoint(cluster, job, out)
    nodes = f"--nodelist={cluster.facts(job)['NodeList']}"
    other = cluster.run(
        "sbatch", "--parsable", "--partition=hard", nodes, "--exclusive", "--wrap=true", "--output=/dev/null"
    )
    wait_until(lambda: cluster.facts(job)["PreemptTime"] != "None", "the preemption")
    wake(ranks)
    cluster.wait(other.stdout.strip())  # otherwise it might preempt a second time


def time_out(cluster, job: str, out: Path) -> None:
    """SLURM sends SIGUSR2 two minutes before the limit, which it checks twice a minute, and wakes stopped processes."""
    frozen_after_a_checkpoint(cluster, job, out)
    hours, minutes, _ = cluster.facts(job)["RunTime"].split(":")
    set_limit(cluster, job, int(hours) * 60 + int(minutes) + 2)  # of a slow machine's attempt, too


def kill(cluster, job: str, out: Path) -> None:
    """Kill one rank, as the system does when memory runs out."""
    ranks = frozen_after_a_checkpoint(cluster, job, out)
    os.kill(ranks[max(ranks)], signal.SIGKILL)
    wake(ranks)


def check_same(out: Path, expected: Path) -> None:
    one, other = weights(expected), weights(out)
    assert all(torch.equal(one[key], other[key]) for key in one)
    written = [row["iteration"] for row in rows(out)]
    assert written == sorted(set(written)) and written[-1] == TOTAL - 1


@pytest.fixture(scope="module")
def two_by_two(cluster, images, tmp_path_factory):
    """An uninterrupted run of 2 nodes with 2 processes each, below a folder with spaces, named by the job."""
    folder = tmp_path_factory.mktemp("my runs")
    done = cluster.train(*arguments(images, "job %j", "--nodes", 2), cwd=folder)
    job = done.stdout.split()[1]
    out = folder / f"job {job}"
    assert f"files: {out}\n" in done.stdout
    cluster.wait(job)
    assert [path.name for path in folder.iterdir()] == [f"job {job}"], "no folder called %j"
    return out


def test_everything_is_in_the_run_directory(two_by_two):
    job = two_by_two.name.removeprefix("job ")
    files = {path.name for path in two_by_two.iterdir()}
    logs = {f"{job}_{rank}_log.{stream}" for rank in range(4) for stream in ("out", "err")}
    assert logs | {f"{job}_log.out", f"{job}_submission.sh", f"{job}_config.yaml", "config.yaml"} <= files
    log = (two_by_two / f"{job}_log.out").read_text()
    assert log.count("environment: node") == 2 and sys.executable in log
    assert "not requeued: the run is complete" in log
    assert "world_size=4" in (two_by_two / "logs/log.txt").read_text()
    script = (two_by_two / f"{job}_submission.sh").read_text()
    assert "# submitted by: cd " in script and "run/train/train.py --cpu --ngpus 2" in script
    assert {f"log.txt.rank{rank}" for rank in (1, 2, 3)} <= {path.name for path in (two_by_two / "logs").iterdir()}


def test_the_shortest_command_gets_its_gpus_and_as_many_cores_as_there_are(cluster, images, tmp_path):
    """The job reports that there are no GPUs; with --cpu, as in all other tests, it does not check."""
    values = dict(text.split("=", 1) for text in arguments(images, "") if "=" in str(text))
    (tmp_path / "configs").mkdir()
    OmegaConf.save(OmegaConf.from_dotlist([f"{k}={v}" for k, v in values.items()]), tmp_path / "configs/vitl.yaml")
    (tmp_path / "run").symlink_to(Path(__file__).parents[2] / "run")
    ordered = "run/train/train.py --config-file configs/vitl.yaml --ngpus 2 --partition hard"
    done = cluster.run(sys.executable, *ordered.split(), cwd=tmp_path)
    job = done.stdout.split()[1]
    facts = cluster.wait(job, states=["FAILED"])
    assert (facts["Restarts"], facts["Partition"], facts["CPUs/Task"]) == ("0", "hard", "4"), "nodes have 8 cores"
    (out,) = (tmp_path / "outputs").iterdir()
    log = (out / f"{job}_log.out").read_text()
    assert "error: expected to use the GPUs that CUDA_VISIBLE_DEVICES=0,1 names, got none: torch" in log
    assert not list(out.parent.parent.glob(".submission*")) and not list(out.glob(".submission*"))

    again = cluster.run("sbatch", "--parsable", out / f"{job}_submission.sh", cwd=tmp_path).stdout.strip()
    cluster.wait(again, states=["FAILED"])
    (line,) = [line for line in (out / f"{again}_log.out").read_text().splitlines() if line.startswith("error: ")]
    assert "this script alone starts nothing, give the command again: cd " in line and line.endswith(ordered)


def test_a_complete_run_is_not_done_again(cluster, images, two_by_two):
    before = (two_by_two / "model_final" / "checkpoint.json").stat().st_mtime_ns
    job = cluster.submit(*arguments(images, two_by_two, "--nodes", 2))
    assert cluster.wait(job)["Restarts"] == "0"
    assert "nothing to do" in (two_by_two / "logs/log.txt").read_text()
    assert (two_by_two / "model_final" / "checkpoint.json").stat().st_mtime_ns == before


def test_preempted_timed_out_and_killed_gives_the_same_weights(cluster, images, two_by_two, tmp_path):
    out = tmp_path / "out"
    job = cluster.submit(*arguments(images, out, "--nodes", 2))
    for attempt, interrupt in enumerate((preempt, time_out, kill)):
        interrupt(cluster, job, out)
        wait_until(lambda a=attempt: int(cluster.facts(job)["Restarts"]) > a, f"restart {attempt + 1}")
        set_limit(cluster, job, 10)
    assert cluster.wait(job)["Restarts"] == "3"
    check_same(out, two_by_two)
    log = (out / f"{job}_log.out").read_text()
    assert log.count("requeued: stopped after a save") == 2 and log.count("resumes from its last checkpoint") == 1
    main_log = (out / "logs/log.txt").read_text()
    assert "SIGTERM received" in main_log and "SIGUSR2 received" in main_log and main_log.count("resumed from=") == 3


def test_without_resume_only_the_first_attempt_starts_anew(cluster, images, tmp_path):
    out = tmp_path / "out"
    cluster.wait(cluster.submit(*arguments(images, out)))
    job = cluster.submit(*arguments(images, out, "--no-resume"))
    preempt(cluster, job, out)
    assert cluster.wait(job)["Restarts"] == "1"
    (whole,) = out.glob("previous_*")
    check_same(out, whole)
    assert "resumed from=" in (out / "logs/log.txt").read_text()


def test_a_signal_before_the_first_step_is_no_failure_in_a_job_array_too(cluster, tmp_path):
    flags = "--ngpus 2 --cpus-per-task 1 --timeout 5 --wait-in-attempt 0 --sweep a=1,2 --output-dir".split()
    done = cluster.run(sys.executable, "-m", "tests.slurm.who", *flags, tmp_path / "out", cwd=tmp_path)
    job = done.stdout.split()[1]
    assert f"\n{tmp_path}/out/0: a=1\n{tmp_path}/out/1: a=2\n" in done.stdout
    wait_until(lambda: len(list(tmp_path.glob("out/?/waiting*"))) == 4, "two processes of two jobs")
    for task, of_the_other in enumerate(("0", "1")):  # to SLURM the number of one is that of all
        cluster.run("scancel", "--signal=TERM", f"{job}_{task}")
        wait_until(lambda t=task: cluster.facts(f"{job}_{t}")["Restarts"] == "1", "a restart")
        assert cluster.facts(f"{job}_{1 - task}")["Restarts"] == of_the_other
    for task in range(2):
        assert cluster.wait(f"{job}_{task}")["Restarts"] == "1"
        assert "requeued: stopped by a signal" in (tmp_path / "out" / f"{job}_{task}_log.out").read_text()
        assert json.loads((tmp_path / "out" / str(task) / "who.json").read_text())["opts"] == [f"a={task + 1}"]


def test_a_cancelled_job_stays_cancelled(cluster, images, tmp_path):
    job = cluster.submit(*arguments(images, tmp_path / "out"))
    wait_until(lambda: last_checkpoint(tmp_path / "out"), "a checkpoint")
    cluster.run("scancel", job)
    cluster.wait(job, states=["CANCELLED"])
    time.sleep(6)  # a requeued job would start after five seconds
    assert cluster.facts(job)["JobState"] == "CANCELLED" and cluster.facts(job)["Restarts"] == "0"


def test_a_run_that_fails_is_not_requeued(cluster, tmp_path):
    job = cluster.submit(*arguments(tmp_path / "absent", tmp_path / "out"))
    facts = cluster.wait(job, states=["FAILED"])
    assert facts["Restarts"] == "0"
    log = (tmp_path / "out" / f"{job}_log.out").read_text()
    assert "not requeued: it ended with an error that another attempt would repeat" in log
    said = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and str(tmp_path / "absent") in said[0], "the log that the user follows has the reason"
    errors = (tmp_path / "out" / f"{job}_0_log.err").read_text()
    assert errors.startswith("error: ") and "Traceback" not in errors


def test_interactive_allocations(cluster, images, tmp_path):
    """``salloc`` with the local launcher, and ``srun`` with one process per rank, run every rank once."""
    few = ["train.OFFICIAL_EPOCH_LENGTH=2", "--launcher"]
    python = [sys.executable, Path(__file__).parents[2] / "run/train/train.py"]
    common = [a for a in arguments(images, "OUT") if a not in ("--cpus-per-task", "--timeout", 10)]
    common.remove(2)  # the value of --cpus-per-task
    local = [tmp_path / "local" if a == "OUT" else a for a in common]
    cluster.run("salloc", "--nodes=1", "--ntasks=1", "--quiet", *python, *local, *few, "local")
    inline = [tmp_path / "inline" if a == "OUT" else a for a in common]
    cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *python, *inline, *few, "inline")
    for name, size in (("local", 2), ("inline", 2)):
        assert f"world_size={size}" in (tmp_path / name / "logs/log.txt").read_text()
        logs = {path.name for path in (tmp_path / name / "logs").glob("log.txt*")}
        assert logs == {"log.txt", *(f"log.txt.rank{rank}" for rank in range(1, size))}


def test_a_decoder_is_trained_by_two_processes_and_continues_after_a_signal(cluster, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra decoder")
    for name in ("accelerate", "pycocotools", "scipy"):
        pytest.importorskip(name, reason="needs the extra decoder")
    if not hasattr(transformers, "RfDetrForObjectDetection"):
        pytest.skip("needs the extra decoder: transformers>=5.24")
    from tests.decoder.conftest import TINY as SMALL
    from tests.decoder.scenes import make_split, write_coco
    from tests.decoder.test_train import write_backbone

    data, out = write_coco(make_split(tmp_path / "a", 8), tmp_path / "a" / "labels.json"), tmp_path / "out"
    what = ["--backbone", write_backbone(tmp_path), "--task", "detection", "--train", data, "--val", data]
    flags = ["--cpu", "--ngpus", 2, "--cpus-per-task", 2, "--timeout", 10, "--partition", "hard", "--output-dir", out]
    script = Path(__file__).parents[2] / "run/decoder/train.py"
    job = cluster.run(sys.executable, script, *what, *flags, *SMALL, "batch=2", "epochs=6").stdout.split()[1]
    wait_until(lambda: list(out.glob("checkpoints/*/trainer_state.json")), "a checkpoint")
    cluster.run("scancel", "--signal=TERM", job)
    assert cluster.wait(job)["Restarts"] == "1" and cluster.facts(job)["Partition"] == "hard"
    assert "requeued: stopped by a signal" in (out / f"{job}_log.out").read_text()
    written = [row["iteration"] for row in rows(out)]
    assert sorted(set(written)) == list(range(12)) and {"best", "last"} <= {path.name for path in out.iterdir()}
