"""SLURM's refusals are reported in one sentence and leave neither files nor jobs."""

import re

import pytest

from tests.processes import wait_until
from tests.slurm.test_jobs import arguments


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--partition", "nope"], "--partition: expected one of low, hard, hidden, got partition=nope"),
        (["--partition", "hidden"], "expected a combination you may use, got partition=hidden"),
        (["--ngpus", 3], "expected at most what the nodes have (low: 3 nodes, 8 CPUs, 4000 MB, gpu:2, 1:00:00), got"),
        (["--nodes", 4], "; too much: --nodes, where there are 3"),
        (["--cpus-per-task", 5], "x 5 CPUs (--cpus-per-task) on a node, where one has at most 8"),
        (["--timeout", "2:00:00"], "; too much: --timeout of 120 minutes, where the limit is 60"),
        (["--mem", "64G"], "65536 MB of memory (--mem, --mem-per-gpu) on a node, where one has at most 4000"),
        (
            ["--gres", "gpu:3", "--ngpus", 3, "--cpus-per-task", 1],
            "3 GPUs (--ngpus) on a node, where one has at most 2",
        ),
        (["--mem", "lots"], "--mem: expected a size such as 64G, got mem=lots"),
        (["--constraint", "a100"], "--constraint: expected features that nodes have, got constraint=a100"),
        (["--exclude", "nope"], "--exclude: expected names of nodes, got exclude=nope"),
        (["--reservation", "nope"], "--reservation: expected an existing one, got reservation=nope"),
        (["--slurm", "nonsense=1"], "got: unrecognized option '--nonsense=1'"),
        (["--slurm", "dependency=wrong"], "SLURM: expected a job that it accepts"),
        (["--setup", "if"], "--setup: expected lines of bash, got: "),
    ],
)
def test_refusals(cluster, tmp_path, flags, message):
    before = cluster.queue()
    given = [a for a in arguments(tmp_path, tmp_path / "runs" / "out", *flags) if a != "--cpu"]
    done = cluster.train(*given, check=False)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ") and message in errors[0]
    assert list(tmp_path.iterdir()) == []
    wait_until(lambda: set(cluster.queue()) <= set(before), "the end of the cancelled job")


def test_two_jobs_for_one_directory(cluster, tmp_path):
    held = [*arguments(tmp_path, tmp_path / "out"), "--slurm", "hold"]
    jobs = [cluster.submit(*held)]
    for flags, warnings in (([], 1), (["--slurm", f"dependency=afterany:{jobs[0]}"], 0)):
        done = cluster.train(*held, *flags)
        jobs.append(done.stdout.split()[1])
        assert done.stderr.count(f"there is already a job for {tmp_path / 'out'}: {jobs[0]} PENDING;") == warnings
    cluster.run("scancel", *jobs)


def test_a_dry_run_asks_slurm(cluster, tmp_path):
    before = cluster.queue()
    flags = ["--partition", "low", "--dry-run"]
    done = cluster.train(*arguments(tmp_path, tmp_path / "out", *flags))
    assert re.search(r"# SLURM would accept this job: Job \d+ to start at 20\d\d-\S+ using .* low", done.stderr), (
        done.stderr
    )
    assert done.stdout.startswith("#!/bin/bash\n")
    for more, reason in (("--ngpus=3", "3 GPUs (--ngpus) on a node"), ("--timeout=2800", "--timeout of 2800 minutes")):
        given = [a for a in arguments(tmp_path, tmp_path / "out", *flags, more) if a != "--cpu"]
        done = cluster.train(*given, check=False)
        said = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and re.match("# SLURM would (refuse|not run) this job: --", said) and reason in said
    assert list(tmp_path.iterdir()) == [] and cluster.queue() == before


UP = "--partition: expected a partition that is up, got partition=hard ("


@pytest.mark.parametrize(
    "change, back, flags, reason",
    [
        ("", "", ["--partition", "hidden"], "(account unknown, where hidden allows nobody)"),
        ("", "", ["--partition", "hidden", "--account", "lab"], "(account lab, where hidden allows nobody)"),
        ("DenyAccounts=lab", "DenyAccounts=", ["--partition", "hard", "--account", "lab"], "where hard allows others)"),
        ("AllowQos=gold", "AllowQos=ALL", ["--partition", "hard", "--qos", "silver"], "(hard allows QOS gold)"),
        ("State=DOWN", "State=UP", ["--partition", "hard"], f"{UP}partition DOWN)"),
        ("State=DRAIN", "State=UP", ["--partition", "hard"], UP),
        ("State=INACTIVE", "State=UP", ["--partition", "hard"], UP),
    ],
)
def test_dry_run_reports_a_closed_partition(cluster, tmp_path, change, back, flags, reason):
    if change:
        cluster.run("scontrol", "update", "PartitionName=hard", change)
    try:
        given = [*arguments(tmp_path, tmp_path / "out", *flags), "--dry-run"]
        done = cluster.train(*given, check=False)
        with_another = cluster.train(*given, "--partition", f"{flags[1]},low", check=False)
    finally:
        if change:
            cluster.run("scontrol", "update", "PartitionName=hard", back)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and reason in said and " accept " not in said, said
    if reason != UP:  # SLURM itself refuses that list
        assert with_another.returncode == 0 and "# SLURM would accept this job" in with_another.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_value_is_what_was_given_whatever_it_holds(cluster, tmp_path):
    comment = 'it\'s "a" # $HOME $(touch PWNED); `touch PWNED` --nodes=3'
    job = cluster.submit(
        *arguments(tmp_path, tmp_path / "o u't", "--comment", comment, "--slurm", "hold"), cwd=tmp_path
    )
    shown = cluster.run("scontrol", "show", "job", job).stdout
    assert (
        f"Comment={comment}" in shown and "NumNodes=1-1" in shown and f"StdOut={tmp_path}/o u't/{job}_log.out" in shown
    )
    assert (tmp_path / "o u't" / f"{job}_submitted.pkl").stat().st_mode & 0o077 == 0
    cluster.run("scancel", job)
    assert not list(tmp_path.glob("PWNED"))


def test_a_controller_that_does_not_answer(cluster, tmp_path):
    text = (cluster.folder / "slurm.conf").read_text()
    other = re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1", text) + "MessageTimeout=2\n"
    (tmp_path / "slurm.conf").write_text(other)
    environment = cluster.environment | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    done = cluster.train(*arguments(tmp_path, tmp_path / "out"), check=False, env=environment)
    assert done.returncode == 1
    assert "error: SLURM: expected a controller that answers, got: " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
