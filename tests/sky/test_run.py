"""The run block on two nodes: this machine twice, with simulated SkyPilot variables. Killed, and resumed on one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.processes import wait_until
from tests.sky.conftest import REPOSITORY, free_port
from tests.train.batches import TINY
from tests.train.test_train import rows, write_images

TASK = yaml.safe_load((REPOSITORY / "sky" / "train.yaml").read_text())
RUN = TASK["run"]
# stands for the lines that SkyPilot appends to wait for the uploads: reached after any end, with bash's default options
EPILOGUE = (
    '\nended=$?\necho "uploads waited for, options $- $(set -o | grep pipefail | tr -s "[:space:]" " ")"\nexit $ended'
)
TOTAL, WANDB_KEY = 24, "0123456789abcdef0123456789abcdef01234567"


class Launch:
    """The run block on each node of a simulated cluster."""

    def __init__(self, folder, images, nodes: int, gpus: int = 1, length: int = TOTAL, more: str = "", **changes: str):
        overrides = [
            *TINY,  # at most 4 images at once
            f"train.OFFICIAL_EPOCH_LENGTH={length}",
            "optim.epochs=1",
            "optim.warmup_epochs=0.25",
            "train.num_workers=0",
            "train.log_every=1",
            "checkpointing.period=4",
            more,
        ]
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "SKYPILOT"))},
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "VENV": sys.prefix,
            "MASTER_PORT": str(free_port()),
            "RUN_NAME": "run-1",
            "DATASET": str(images),
            "CHECKPOINT_DIR": str(folder / "checkpoints"),
            "CONFIG": "configs/vits.yaml",
            "GLOBAL_BATCH": "8",
            "OVERRIDES": " ".join(overrides),
            "WANDB_API_KEY": "",
            "SKYPILOT_TASK_ID": f"sky-{time.time_ns()}",  # marks the processes of this launch
            "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * nodes),
            "SKYPILOT_NUM_NODES": str(nodes),
            "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus),
            "CUDA_VISIBLE_DEVICES": "",  # there are none here
            **changes,
        }
        self.mark = env["SKYPILOT_TASK_ID"]
        self.out = Path(env["CHECKPOINT_DIR"]) / env["RUN_NAME"]
        self.logs = [folder / f"node{rank}.log" for rank in range(nodes)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(
                        ["bash", "-c", RUN + EPILOGUE],
                        cwd=REPOSITORY,
                        env={**env, "SKYPILOT_NODE_RANK": str(rank)},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self) -> list[int]:
        try:
            return [process.wait(timeout=600) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill all processes: torchrun's workers have their own session and would outlive it."""
        while found := processes_with(self.mark):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            for process in self.processes:
                process.poll()
        for process in self.processes:
            process.wait(timeout=600)

    def log(self) -> str:
        return "".join(log.read_text() for log in self.logs)


def processes_with(mark: str) -> list[int]:
    """Return the ids of processes whose environment has ``mark``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return found


def wait_for_checkpoint(launch: Launch, line: str = "") -> None:
    """Wait for a checkpoint and ``line`` in the log; fail if the launch ends first."""
    marker = launch.out / "last_checkpoint"
    try:
        wait_until(lambda: marker.exists() and line in launch.log(), "a checkpoint", launch.processes)
    except AssertionError:
        launch.kill()
        raise AssertionError(launch.log()) from None


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 12)


def test_two_nodes_killed_then_resumed_on_one(images, tmp_path):
    first = Launch(tmp_path, images, nodes=2)
    wait_for_checkpoint(first)
    first.kill()
    assert not (first.out / "model_final").exists()
    assert "4 per process x 2 processes x 1 accumulated = 8" in first.log()

    key = {"WANDB_API_KEY": WANDB_KEY, "WANDB_MODE": "offline"}
    second = Launch(tmp_path, images, nodes=1, gpus=0, **key)
    assert second.wait() == [0], second.log()
    log = second.log()
    assert "4 per process x 1 processes x 2 accumulated = 8" in log and "resumed from=" in log
    assert "uploads waited for" in log and "Traceback" not in log
    iterations = [row["iteration"] for row in rows(second.out)]
    assert iterations == sorted(set(iterations)) and iterations[-1] == TOTAL - 1
    assert len(iterations) >= TOTAL - 1  # a kill between a checkpoint and its row costs the row

    assert (second.out / "logs" / "wandb_run_id").read_text().strip() == "run-1"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and not [path for path in written if WANDB_KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RUN_NAME": "../escape"}, "error: expected RUN_NAME of letters, digits, '_', '-' and '.', got '../escape'"),
        ({"SKYPILOT_NUM_GPUS_PER_NODE": "3"}, "a multiple of the 3 processes, got 8 -> start 2 or 4 processes"),
    ],
)
def test_a_mistake_is_no_reason_to_start_again_and_still_waits_for_the_uploads(images, tmp_path, changes, message):
    launch = Launch(tmp_path, images, nodes=1, **changes)
    assert launch.wait() == [1]
    assert message in launch.log()
    waited = launch.log().splitlines()[-1]
    assert waited.startswith("uploads waited for, options ") and waited.endswith("pipefail off ")
    assert not set("eu") & set(waited.split()[4])
    assert not (tmp_path / "checkpoints").exists()


def trainers(launch: Launch) -> dict[int, int]:
    """Return rank -> process of each training process of a launch."""
    found = {}
    for pid in processes_with(launch.mark):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "run/train/train.py" in words[1:3]:
                rank = re.search(r"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes().decode())
                found[int(rank[1])] = pid
    return found


def test_skypilot_gets_the_exit_codes_of_kills_and_signals(images, tmp_path):
    launch = Launch(tmp_path, images, nodes=1, gpus=2, length=4000)
    wait_for_checkpoint(launch)
    os.kill(trainers(launch)[1], signal.SIGKILL)
    assert launch.wait() == [137], launch.log()

    again = Launch(tmp_path, images, nodes=1, gpus=2, length=4000)
    wait_for_checkpoint(again, "Training  [")
    for pid in processes_with(again.mark):  # as `sky cancel` does
        with contextlib.suppress(ProcessLookupError, OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() != "bash":
                os.kill(pid, signal.SIGTERM)
    assert again.wait() == [143], again.log()
    assert "the same command resumes from" in again.log() and "uploads waited for" in again.log()
    assert {137, 143} <= set(TASK["resources"]["job_recovery"]["recover_on_exit_codes"])


def test_the_key_is_not_on_a_command_line(images, tmp_path):
    """A stand-in for Python records its arguments."""
    seen = tmp_path / "seen.txt"
    fake = tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    real = f'exec {sys.executable} "$@"'
    fake.write_text(f'#!/bin/sh\ncase "$1$2" in *run.local) printf "%s\\n" "$@" >{seen};; *) {real};; esac\n')
    fake.chmod(0o755)
    launch = Launch(tmp_path, images, 1, VENV=str(tmp_path / "venv"), WANDB_API_KEY=WANDB_KEY, OVERRIDES="a=1 b=[2,3]")
    assert launch.wait() == [0], launch.log()
    arguments = seen.read_text().split("\n")[:-1]
    assert arguments[:2] == ["-m", "dinov2_custom.run.local"]
    assert {"wandb.mode=online", "wandb.name=run-1", "a=1", "b=[2,3]"} <= set(arguments)
    assert WANDB_KEY not in seen.read_text() + launch.log()
    assert arguments.count("optim.global_batch=8") == 1
