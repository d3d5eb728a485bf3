"""The tasks satisfy the rules, and each rule detects its mistake. None of this needs SkyPilot."""

import copy
import os
import re

import pytest
import yaml

from tests.sky.conftest import REPOSITORY
from tests.sky.rules import candidates, mistakes, num_gpus

TASKS = {path.stem: yaml.safe_load(path.read_text()) for path in (REPOSITORY / "sky").glob("*.yaml")}
TASKS = {name: task for name, task in TASKS.items() if "run" in task}


def changed(name: str, dotted: str, value) -> dict:
    task = copy.deepcopy(TASKS[name])
    *parents, last = dotted.split("|")
    place = task
    for key in parents:
        place = place[int(key) if key.isdecimal() else key]
    place[int(last) if last.isdecimal() else last] = value
    return task


def test_both_tasks_are_here():
    assert set(TASKS) == {"train", "debug"}
    assert not (REPOSITORY / "sky" / "__init__.py").exists()  # it would hide the package of SkyPilot


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_no_mistake(name):
    assert mistakes(TASKS[name], REPOSITORY) == []


@pytest.mark.parametrize(
    ("dotted", "value", "expected"),
    [
        ("bogus", 1, "unknown key bogus"),
        ("workdir", "./nope", "workdir ./nope does not exist"),
        ("resources|spot_recovery", "FAILOVER", "unknown key resources.spot_recovery"),
        ("resources|job_recovery|strategy", "NOPE", "recovery strategy NOPE is none of"),
        ("resources|job_recovery|max_restart_on_errors", 1, "unknown key job_recovery.max_restart_on_errors"),
        ("resources|autostop|idle", 1, "unknown key autostop.idle"),
        ("resources|ordered|0|accelerators", "H1000:8", "unknown GPU H1000:8"),
        ("resources|ordered|0|accelerators", "H100:6", "GLOBAL_BATCH 1024 is no multiple of 1 x H100:6"),
        ("num_nodes", 3, "GLOBAL_BATCH 1024 is no multiple of 3 x H100:8"),
        ("resources|ordered|0|use_spot", False, "spot machines first"),
        ("resources|ordered|0|cloud", "aws", "unknown key cloud of a choice"),
        ("secrets|WANDB_API_KEY", None, "secret WANDB_API_KEY is null"),
        ("secrets|WANDB_API_KEY", "abc", "secret WANDB_API_KEY has a value in the file"),
        ("envs|HF_TOKEN", "", "HF_TOKEN belongs to secrets"),
        ("file_mounts|data", "s3://bucket", "data is not absolute"),
        ("file_mounts|/cfg", "./nope", "source ./nope of /cfg does not exist"),
        ("file_mounts|/cfg", "${NOPE}", "is no variable of envs"),
        ("file_mounts|/checkpoints|mode", "CACHED", "mode CACHED of /checkpoints is none of"),
        ("file_mounts|/checkpoints|config|mount_cached|size", 1, "unknown key mount_cached.size"),
        ("setup", "", "setup is empty"),
        ("setup", "bash sky/nope.sh", "setup: sky/nope.sh does not exist"),
        ("run", "set -euo pipefail\nbash sky/run.sh", "keep SkyPilot from waiting for the uploads"),
        ("run", "exec bash sky/run.sh", "keep SkyPilot from waiting for the uploads"),
    ],
)
def test_a_mistake_is_found(dotted, value, expected):
    found = mistakes(changed("train", dotted, value), REPOSITORY)
    assert any(expected in mistake for mistake in found), found


def test_training_asks_for_spot_first_on_several_kinds_of_gpu_and_counts():
    choices = candidates(TASKS["train"])
    kinds = {choice["accelerators"].split(":")[0] for choice in choices}
    assert len(kinds) >= 3
    assert kinds == {c["accelerators"].split(":")[0] for c in choices if not c["use_spot"]}
    assert len({num_gpus(choice["accelerators"]) for choice in choices}) >= 2
    assert TASKS["train"]["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    assert TASKS["train"]["resources"]["autostop"]["down"] is True


def test_required_settings_have_no_default():
    null = {name: {key for key, value in task["envs"].items() if value is None} for name, task in TASKS.items()}
    assert null == {"train": {"RUN_NAME", "DATA", "CHECKPOINTS"}, "debug": {"DATA"}}


def test_debug_runs_the_same_commands():
    assert [TASKS["debug"][block] for block in ("setup", "run")] == [
        TASKS["train"][block] for block in ("setup", "run")
    ]
    assert TASKS["debug"]["envs"].keys() <= TASKS["train"]["envs"].keys()


@pytest.mark.parametrize("name", TASKS)
def test_scripts_use_what_the_task_sets_and_the_other_way_round(name):
    """Variables without a default in a script must be in envs; each env must be used by a script or in file_mounts."""
    text = "".join((REPOSITORY / "sky" / script).read_text() for script in ("setup.sh", "run.sh"))
    code = "\n".join(line.partition(" #")[0] for line in text.splitlines() if not line.startswith("#"))
    defaults = set(re.findall(r"\$\{(\w+):?-", code)) | set(re.findall(r"^\s*(?:export )?(\w+)=", code, re.MULTILINE))
    used = set(re.findall(r"\$\{?#?([A-Z][A-Z_]+)\b", code)) | set(re.findall(r"SKYPILOT_\w+", code))
    given = set(TASKS[name]["envs"]) | set(TASKS[name]["secrets"])
    theirs = {"HOME", "BASH_SOURCE", *(f"SKYPILOT_{n}" for n in ("NUM_NODES", "NODE_RANK", "NODE_IPS"))}
    assert used - defaults - given - theirs == {"SKYPILOT_NUM_GPUS_PER_NODE"}
    assert given - used == ({"CHECKPOINTS", "DATA"} if name == "train" else {"DATA"})


@pytest.mark.parametrize("name", TASKS)
def test_configuration_and_overrides_are_legal(name):
    from dinov2_custom.configs.load import load_run_config
    from dinov2_custom.data.spec import parse_dataset

    envs = TASKS[name]["envs"]
    overrides = [f"optim.global_batch={envs['GLOBAL_BATCH']}", *envs["OVERRIDES"].split()]
    load_run_config(str(REPOSITORY / envs["CONFIG"]), overrides, require_dataset=False, warn=pytest.fail)
    copied = [place for place, mount in TASKS[name]["file_mounts"].items() if mount["mode"] == "COPY"]
    assert parse_dataset(envs["DATASET"]).roots == (os.path.expanduser(copied[0]),)
