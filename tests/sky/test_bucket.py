"""Checkpoints in a bucket mounted as MOUNT_CACHED does it (rclone, the same options), and a machine that is preempted.

Needs FUSE: /dev/fuse, fusermount3 and the right to mount.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from dinov2_custom.utils.checkpoint_folder import MARKER
from tests.processes import wait_until
from tests.sky.conftest import REPOSITORY
from tests.sky.test_run import Launch
from tests.train.test_train import rows, write_images

TOTAL = 300
OPTIONS = [  # what SkyPilot 0.14.1 passes, but for the times: shorter here
    "--daemon", "--daemon-wait=10s", "--log-level=INFO", "--allow-other", "--vfs-cache-mode=full",
    "--dir-cache-time=10s", "--vfs-cache-poll-interval=1s", "--vfs-fast-fingerprint", "--vfs-cache-max-size=10G",
    "--vfs-write-back=1s",
]  # fmt: skip


class Mount:
    """The bucket mounted on a separate machine: it lacks what another machine has not uploaded."""

    def __init__(self, bucket, folder: Path):
        self.folder, self.cache, self.log = folder / "checkpoints", folder / "cache", folder / "log.txt"
        self.folder.mkdir(parents=True)
        where = [f":s3:{bucket.name}", str(self.folder), f"--cache-dir={self.cache}", f"--log-file={self.log}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the daemon would keep a pipe open
        done = subprocess.run(["rclone", "mount", *where, *OPTIONS], env=bucket.env, timeout=600, **quiet)
        if done.returncode:
            pytest.skip(f"needs the right to mount a bucket: {self.log.read_text()[-200:]}")

    def uploaded(self) -> bool:
        """Return whether no upload is pending, as SkyPilot checks at the end of a job."""
        last = re.findall(r"vfs cache: cleaned:.*", self.log.read_text())[-1:]
        return bool(last) and "in use 0, to upload 0, uploading 0" in last[0]

    def take_away(self) -> None:
        """Kill rclone before it can upload, and delete its cache."""
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"--cache-dir={self.cache}".encode() in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
        subprocess.run(["fusermount3", "-uz", str(self.folder)], capture_output=True, timeout=600)
        shutil.rmtree(self.cache, ignore_errors=True)


def in_bucket(bucket) -> set[str]:
    command = ["rclone", "lsf", "-R", "--files-only", f":s3:{bucket.name}"]
    done = subprocess.run(command, env=bucket.env, capture_output=True, text=True, timeout=600, check=True)
    return set(done.stdout.split())


def complete(files: set[str]) -> set[str]:
    """Return the checkpoints with a marker; if their other files arrive later, the previous one is used."""
    return {file for file in files if re.fullmatch(rf"run-1/model_\d+/{re.escape(MARKER)}", file)}


@pytest.fixture
def machines(bucket, tmp_path):
    """Create machines with the bucket mounted, and remove all of them at the end."""
    if not os.path.exists("/dev/fuse") or shutil.which("fusermount3") is None:
        pytest.skip("needs FUSE: /dev/fuse, and tests/sky/install.sh")
    made = []

    def machine(name: str) -> Mount:
        made.append(Mount(bucket, tmp_path / name))
        return made[-1]

    yield machine
    for mount in made:
        mount.take_away()


def test_another_machine_resumes_from_the_bucket_after_a_preemption(bucket, machines, tmp_path):
    images = write_images(tmp_path / "images", 12)
    first = machines("first")
    keep = "checkpointing.period=10 checkpointing.keep_last=100"  # none is removed before it is uploaded
    options = {"length": TOTAL, "more": keep, "CHECKPOINT_DIR": str(first.folder)}
    launch = Launch(tmp_path / "first", images, nodes=1, gpus=2, **options)
    try:
        wait_until(lambda: len(complete(in_bucket(bucket))) >= 2, "two checkpoints", launch.processes)
    finally:
        launch.kill()
        first.take_away()
    left = in_bucket(bucket)
    assert not any("model_final" in file for file in left)

    second = machines("second")
    options["CHECKPOINT_DIR"] = str(second.folder)
    launch = Launch(tmp_path / "second", images, nodes=1, gpus=1, **options)
    assert launch.wait() == [0], launch.log()
    resumed = re.search(r"resumed from=\S+ iteration=(\d+)", launch.log())
    assert resumed and 0 < int(resumed[1]) < TOTAL - 1, launch.log()
    assert "Traceback" not in launch.log()
    wait_until(second.uploaded, "the upload")

    third = machines("third")  # what is in the bucket, seen by a machine that wrote none of it
    out = third.folder / "run-1"
    assert rows(out)[-1]["iteration"] == TOTAL - 1
    assert any(name.startswith("model_final") for name in os.listdir(out))
    teacher = out / "eval" / f"training_{TOTAL - 1}" / "teacher_checkpoint.pth"
    assert teacher.read_bytes() == (second.folder / teacher.relative_to(third.folder)).read_bytes()


def test_the_task_mounts_the_bucket_so():
    task = yaml.safe_load((REPOSITORY / "sky" / "train.yaml").read_text())
    mount = task["file_mounts"][task["envs"]["CHECKPOINT_DIR"]]
    assert mount["mode"] == "MOUNT_CACHED" and set(mount["config"]["mount_cached"]) == {
        "vfs_cache_max_size",
        "vfs_write_back",
    }
