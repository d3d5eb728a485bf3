"""Mistakes in a task that SkyPilot accepts, or reports only after machines have been paid for.

Works without SkyPilot; ``test_skypilot.py`` compares the tables with the installed one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TASK_KEYS = {"name", "num_nodes", "workdir", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
CANDIDATE_KEYS = {"infra", "accelerators", "cpus", "memory", "disk_size", "disk_tier", "use_spot", "image_id"}
RESOURCE_KEYS = CANDIDATE_KEYS | {"any_of", "ordered", "job_recovery", "autostop"}
RECOVERY_KEYS = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
AUTOSTOP_KEYS = {"idle_minutes", "down", "wait_for", "hook", "hook_timeout"}
MOUNT_KEYS = {"name", "source", "store", "mode", "config"}
CACHE_KEYS = {"transfers", "buffer_size", "vfs_cache_max_size", "vfs_cache_max_age", "vfs_write_back", "vfs_read_ahead"}
STRATEGIES = {"FAILOVER", "EAGER_NEXT_REGION"}
MODES = {"MOUNT", "COPY", "MOUNT_CACHED"}
GPUS = {"A100", "A100-80GB", "A10G", "B200", "H100", "H200", "L4", "L40S", "T4", "V100"}
URL = re.compile(r"(s3|gs|r2|cos|oci|https)://")


def mistakes(task: dict[str, Any], root: Path) -> list[str]:
    """Return every mistake of a task, one sentence each; ``root`` is the directory in which ``sky`` is called."""
    found = [f"unknown key {key}" for key in task.keys() - TASK_KEYS]
    if not (root / task.get("workdir", ".")).is_dir():
        found.append(f"workdir {task['workdir']} does not exist")
    found += _resources(task)
    found += _secrets(task)
    for target, mount in (task.get("file_mounts") or {}).items():
        found += _mount(target, mount, task, root)
    found += _blocks(task, root)
    return found


def candidates(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each choice of machines, including common settings."""
    resources = dict(task.get("resources", {}))
    choices = resources.pop("any_of", None) or resources.pop("ordered", None) or [{}]
    return [{**resources, **choice} for choice in choices]


def num_gpus(accelerators: str) -> int:
    """Return the number in ``H100:8``; 1 if there is none."""
    return int((accelerators.split(":") + ["1"])[1])


def _resources(task: dict[str, Any]) -> Iterator[str]:
    resources = task.get("resources", {})
    for where, keys in (("job_recovery", RECOVERY_KEYS), ("autostop", AUTOSTOP_KEYS)):
        yield from (f"unknown key {where}.{key}" for key in resources.get(where, {}).keys() - keys)
    yield from (f"unknown key resources.{key}" for key in resources.keys() - RESOURCE_KEYS)
    strategy = resources.get("job_recovery", {}).get("strategy", "FAILOVER")
    if strategy not in STRATEGIES:
        yield f"recovery strategy {strategy} is none of {sorted(STRATEGIES)}"
    nodes, batch = task.get("num_nodes", 1), int(task["envs"]["GLOBAL_BATCH"])
    spot = [bool(choice.get("use_spot")) for choice in candidates(task)]
    if "ordered" in resources and (not any(spot) or all(spot) or spot != sorted(spot, reverse=True)):
        yield "ordered: expected spot machines first and on-demand ones last"
    for choice in resources.get("ordered", []) + resources.get("any_of", []):
        yield from (f"unknown key {key} of a choice" for key in choice.keys() - CANDIDATE_KEYS)
    for accelerators in filter(None, (choice.get("accelerators") for choice in candidates(task))):
        if accelerators.split(":")[0] not in GPUS:
            yield f"unknown GPU {accelerators}"
        if batch % (nodes * num_gpus(accelerators)):
            yield f"GLOBAL_BATCH {batch} is no multiple of {nodes} x {accelerators}"


def _secrets(task: dict[str, Any]) -> Iterator[str]:
    for name, value in (task.get("secrets") or {}).items():
        if value is None:
            yield f"secret {name} is null: the launch fails where it is not given"
        elif value != "":
            yield f"secret {name} has a value in the file"
    for name in task.get("envs", {}):
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name):
            yield f"{name} belongs to secrets"


def _mount(target: str, mount: Any, task: dict[str, Any], root: Path) -> Iterator[str]:
    if not target.startswith(("/", "~/")):
        yield f"file_mounts: {target} is not absolute"
    if isinstance(mount, dict):
        yield from (f"unknown key {key} of {target}" for key in mount.keys() - MOUNT_KEYS)
        cache = mount.get("config", {}).get("mount_cached", {})
        yield from (f"unknown key mount_cached.{key}" for key in cache.keys() - CACHE_KEYS)
        if mount.get("mode", "MOUNT") not in MODES:
            yield f"mode {mount['mode']} of {target} is none of {sorted(MODES)}"
    source = mount.get("source", "") if isinstance(mount, dict) else mount
    names = re.findall(r"\$\{?(\w+)\}?", source)
    yield from (f"{source} of {target} is no variable of envs" for name in names if name not in task["envs"])
    if source and not names and not URL.match(source) and not (root / source).exists():
        yield f"source {source} of {target} does not exist"


def _blocks(task: dict[str, Any], root: Path) -> Iterator[str]:
    for block in ("setup", "run"):
        text = task.get(block) or ""
        if not text.strip():
            yield f"{block} is empty"
        for script in re.findall(r"bash (\S+)", text):
            if not (root / script).is_file():
                yield f"{block}: {script} does not exist"
    # SkyPilot appends lines that wait for the uploads; they have to be reached, and they rely on bash's defaults
    if re.search(r"^\s*(exec|exit)\b|\bset -\w*[eu]|\bset -o|\btrap\b", task.get("run") or "", re.MULTILINE):
        yield "run: exec, exit, set and trap keep SkyPilot from waiting for the uploads"
