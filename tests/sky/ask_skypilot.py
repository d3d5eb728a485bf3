"""Load tasks with SkyPilot and print the results as JSON: python ask_skypilot.py '<requests>' > answers.

Run by the interpreter that has SkyPilot, from a scratch HOME; imports nothing of this repository. Each request is
{"task": a task as a dictionary, "file": or a path, "envs": {name: value}, "secrets": {name: value}}.
"""

import json
import sys

from sky.utils import registry, schemas

import sky


def answer(request: dict) -> dict:
    try:
        if "file" in request:
            task = sky.Task.from_yaml(request["file"])
        else:
            envs, secrets = (list(request.get(kind, {}).items()) for kind in ("envs", "secrets"))
            task = sky.Task.from_yaml_config(request["task"], env_overrides=envs, secrets_overrides=secrets)
        for storage in task.storage_mounts.values():
            storage._validate_storage_spec(storage.name)  # as the server does at the launch, before it asks the cloud
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"}
    choices = [
        {"accelerators": choice.accelerators, "use_spot": choice.use_spot, "recovery": choice.job_recovery}
        for choice in task.resources
    ]
    mounts = {target: (storage.source, storage.mode.value) for target, storage in task.storage_mounts.items()}
    return {
        "choices": choices,
        "ordered": isinstance(task.resources, list),
        "mounts": mounts,
        "envs": task.envs,
        "script": sky_script(task.run),
    }


def sky_script(run: str) -> str:
    """Return the run block with the lines that SkyPilot adds for MOUNT_CACHED."""
    from sky.backends.task_codegen import TaskCodeGen

    return TaskCodeGen.build_task_bash_script(run)


def tables() -> dict:
    resources = schemas.get_resources_schema()["properties"]
    return {
        "version": sky.__version__,
        "strategies": [name.upper() for name in registry.JOBS_RECOVERY_STRATEGY_REGISTRY],
        "task": list(schemas.get_task_schema()["properties"]),
        "resources": list(resources),
        "candidate": list(schemas.get_resources_schema()["properties"]["any_of"]["items"]["properties"]),
        "autostop": json.dumps(resources["autostop"]),
        "job_recovery": json.dumps(resources["job_recovery"]),
        "storage": json.dumps(schemas.get_storage_schema()),
    }


if __name__ == "__main__":
    import sky.jobs.recovery_strategy  # registers the strategies

    json.dump({"tables": tables(), "answers": [answer(request) for request in json.loads(sys.argv[1])]}, sys.stdout)
