"""The tasks as parsed by SkyPilot, offline. Needs SkyPilot, in this environment or that of $SKYPILOT_PYTHON."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest

from tests.sky import rules
from tests.sky.conftest import REPOSITORY
from tests.sky.test_tasks import TASKS, changed

GIVEN = {"RUN_NAME": "run-1", "DATA": "s3://images/shards", "CHECKPOINTS": "s3://my-runs"}
NAMES = {"train": GIVEN, "debug": {"DATA": "s3://images/shards"}}


def interpreter() -> str:
    """Return a Python with SkyPilot. `import sky` proves nothing here: it finds the folder of that name."""
    if path := os.environ.get("SKYPILOT_PYTHON"):
        return path
    try:
        importlib.metadata.version("skypilot")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs SkyPilot: pip install skypilot, or SKYPILOT_PYTHON")
    return sys.executable


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Run requests through SkyPilot in one process (its import takes seconds) and return the answers."""
    python, home = interpreter(), tmp_path_factory.mktemp("home")
    env = {**os.environ, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}

    def ask(*requests: dict) -> dict:
        command = [python, str(REPOSITORY / "tests" / "sky" / "ask_skypilot.py"), json.dumps(requests)]
        done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return ask


@pytest.fixture(scope="module")
def loaded(ask):
    requests = [
        {"task": TASKS[name], "envs": envs, "secrets": {"WANDB_API_KEY": "k3y"}} for name, envs in NAMES.items()
    ]
    return dict(zip(NAMES, ask(*requests)["answers"], strict=True))


def test_tasks_load(loaded):
    for name, answer in loaded.items():
        assert "error" not in answer, answer
        assert answer["envs"].items() >= NAMES[name].items()
    train = loaded["train"]
    data = {"~/dinov2-data": ["s3://images/shards", "COPY"]}
    assert train["ordered"] and train["mounts"] == data | {"/checkpoints": ["s3://my-runs", "MOUNT_CACHED"]}
    assert loaded["debug"]["mounts"] == data
    assert [choice["use_spot"] for choice in train["choices"]] == [
        c["use_spot"] for c in rules.candidates(TASKS["train"])
    ]
    assert {choice["recovery"]["strategy"] for choice in train["choices"]} == {"EAGER_NEXT_REGION"}


def test_required_settings_are_requested_before_any_machine(ask):
    files = [{"file": str(REPOSITORY / "sky" / f"{name}.yaml")} for name in NAMES]
    partly = [{"task": TASKS["train"], "envs": {k: v for k, v in GIVEN.items() if k != left_out}} for left_out in GIVEN]
    errors = [answer["error"] for answer in ask(*files, *partly)["answers"]]
    for error, name in zip(errors, ["RUN_NAME", "DATA", *GIVEN], strict=True):
        assert f"Environment variable '{name}' is None" in error


def test_a_folder_in_the_bucket_of_checkpoints_is_refused(ask):
    (answer,) = ask({"task": TASKS["train"], "envs": GIVEN | {"CHECKPOINTS": "s3://my-runs/folder"}})["answers"]
    assert "specify only the bucket name" in answer["error"]


def test_our_tables_are_those_of_this_version(ask):
    tables = ask()["tables"]
    assert set(tables["strategies"]) == rules.STRATEGIES
    assert set(tables["task"]) >= rules.TASK_KEYS
    assert set(tables["resources"]) >= rules.RESOURCE_KEYS
    assert set(tables["candidate"]) >= rules.CANDIDATE_KEYS
    for keys, where in (
        (rules.RECOVERY_KEYS, "job_recovery"),
        (rules.AUTOSTOP_KEYS, "autostop"),
        (rules.MOUNT_KEYS | rules.CACHE_KEYS | rules.MODES, "storage"),
    ):
        assert [key for key in keys if f'"{key}"' not in tables[where]] == []


def test_our_rules_are_needed(ask):
    """SkyPilot still accepts these mistakes; a rule that it enforces may be removed."""
    mistakes = [
        ("resources|job_recovery|strategy", "NOPE"),
        ("resources|ordered|0|accelerators", "H1000:8"),
        ("secrets|WANDB_API_KEY", None),
        ("run", "set -euo pipefail\nbash sky/run.sh"),
    ]
    requests = [{"task": changed("train", dotted, value), "envs": GIVEN} for dotted, value in mistakes]
    assert ["error" in answer for answer in ask(*requests)["answers"]] == [False] * len(requests)


def test_the_wait_for_uploads_is_reached_after_a_failure(loaded, tmp_path):
    """Run SkyPilot's lines after the run block, with stand-ins for a cached mount that has uploaded everything."""
    for name, answer in (("findmnt", "echo /checkpoints"), ("sleep", ":")):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/sh\n{answer}\n")
        command.chmod(0o755)
    script = loaded["train"]["script"]
    log = tmp_path / re.search(r"-d ~/(\S*rclone\S*)", script)[1] / "x.log"
    log.parent.mkdir(parents=True)
    line = "INFO  : vfs cache: cleaned: objects 9 (was 9) in use 0, to upload 0, uploading 0, total size 1Gi\n"
    log.write_text(line * 20_000)  # longer than a pipe's buffer: with pipefail the wait would never end
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "RUN_NAME": "../x"}
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "expected RUN_NAME" in done.stderr
    assert "cached mount upload complete" in done.stdout
