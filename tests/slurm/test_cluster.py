"""The test cluster: two can run side by side, and each ends when its owning process is killed."""

import subprocess
from pathlib import Path

from tests.processes import running, wait_until

HERE = Path(__file__).parent


def test_it_ends_with_the_process_it_was_started_for(cluster, tmp_path):
    process = subprocess.Popen(["sleep", "600"])
    try:
        with open(tmp_path / "log", "w") as log:
            subprocess.run([HERE / "start.sh", tmp_path / "c", str(process.pid)], check=True, stdout=log, stderr=log)
        second = type(cluster)(tmp_path / "c")
        assert len(second.run("sinfo", "--noheader", "--Node", "--partition=low").stdout.splitlines()) == 3
        names = (tmp_path / "c" / "node_prefix").read_text().strip()
        pids = [int(file.read_text()) for file in (tmp_path / "c" / "pid").iterdir() if file.suffix == ""]
        assert len(pids) >= 4
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not (tmp_path / "c").exists(), "the end of the cluster")
    assert not running(pids)
    assert names not in Path("/etc/hosts").read_text()
    assert cluster.run("sinfo").returncode == 0, "the other one is up"
