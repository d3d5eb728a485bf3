"""One real SLURM with three nodes for all tests here, run by one process because jobs would preempt each other."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.processes import wait_until
from tests.train.test_train import write_images

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
GROUP = "slurm"
DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the markers
def pytest_collection_modifyitems(items):
    """Run all of them first, in one process of pytest-xdist (``--dist loadgroup``), because they take minutes."""
    items.sort(key=lambda item: HERE not in item.path.parents)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group(GROUP))


class Cluster:
    """Commands on the cluster of ``start.sh``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "PYTEST_"))
        } | {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

    def run(self, *command: object, check: bool = True, **options) -> subprocess.CompletedProcess:
        options.setdefault("env", self.environment)
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, **options)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def train(self, *arguments: object, check: bool = True, **options) -> subprocess.CompletedProcess:
        return self.run(sys.executable, REPOSITORY / "run/train/train.py", *arguments, check=check, **options)

    def submit(self, *arguments: object, **options) -> str:
        """Submit a training run and return the job's number."""
        return self.train(*arguments, **options).stdout.split()[1]

    def facts(self, job: str) -> dict[str, str]:
        shown = self.run("scontrol", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job: str, states: Sequence[str] = ("COMPLETED",)) -> dict[str, str]:
        """Wait until the job is in one of ``states``; fail as soon as it is in another final one."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        wait_until(lambda: self.facts(job)["JobState"] in {*states, *final}, f"the end of job {job}")
        facts = self.facts(job)
        assert facts["JobState"] in states, f"{facts['JobState']}: {self.log(job)}"
        return facts

    def log(self, job: str) -> str:
        folder = Path(self.facts(job)["StdOut"]).parent
        return "\n".join(path.read_text() for path in sorted(folder.glob(f"{job}*log.*")))

    def queue(self) -> list[str]:
        return self.run("squeue", "--noheader", "--format", "%i").stdout.split()

    def ranks(self, job: str) -> dict[int, int]:
        """Return {rank: process id} of the job's running processes."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                pairs = [pair.split("=", 1) for pair in path.read_text(errors="replace").split("\0") if "=" in pair]
                command = (path.parent / "cmdline").read_text(errors="replace")
            except OSError:
                continue
            variables = dict(pairs)
            if variables.get("SLURM_JOB_ID") == job and variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                parent = (path.parent / "stat").read_text().rpartition(")")[2].split()[1]
                started_by = Path(f"/proc/{parent}/comm")
                if "submitit.core._submit" in command and started_by.exists():
                    if started_by.read_text().strip() == "slurmstepd":  # not a data-loading process of a rank
                        found[int(variables["SLURM_PROCID"])] = int(path.parent.name)
        return found


@pytest.fixture(scope="session")
def cluster(request, tmp_path_factory):
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if os.getuid() or missing:
        words = f"needs SLURM: no {', '.join(missing)} (tests/slurm/install.sh)" if missing else "needs root: for SLURM"
        pytest.fail(words) if os.environ.get("DINOV2_REQUIRE_SLURM") else pytest.skip(words)
    here = [item.nodeid for item in request.node.items if HERE in item.path.parents]
    if os.environ.get("PYTEST_XDIST_WORKER") and not all(name.endswith(f"@{GROUP}") for name in here):
        pytest.fail("tests/slurm: expected all in one process, got a share of them; pytest < 9.2 with --dist loadgroup")
    folder = tmp_path_factory.mktemp("cluster") / "slurm"
    log = folder.with_name("start.log")  # a file, as the daemons keep what they inherit open
    pytest_pid = os.getppid() if os.environ.get("PYTEST_XDIST_WORKER") else os.getpid()
    with open(log, "w") as output:
        command = [HERE / "start.sh", folder, str(pytest_pid)]
        started = subprocess.run(command, stdout=output, stderr=output).returncode == 0
    try:
        assert started, log.read_text()
        yield Cluster(folder)
    finally:
        subprocess.run([HERE / "stop.sh", folder], check=started)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 16)
