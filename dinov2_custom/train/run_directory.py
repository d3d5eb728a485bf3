"""Exclusive use of a run directory, and what differs between a resumed run and its earlier part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dinov2_custom import files
from dinov2_custom.configs.paths import missing_folders, remove_empty
from dinov2_custom.configs.schema import all_keys
from dinov2_custom.errors import DINOv2Error, LaunchError, LostProcessError
from dinov2_custom.utils.run_folder import LOCK

OF_THE_BATCH = ("optim.global_batch", "train.batch_size_per_gpu", "optim.accumulation_steps", "optim.lr")


@contextmanager
def made_and_locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` and hold it (:func:`locked`); a start that fails before its log is open leaves no new files.

    Raises:
        LaunchError: another process holds the folder.
    """
    missing, lock = missing_folders(folder), folder / LOCK
    ours = not lock.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        try:
            yield
        except BaseException as e:
            if is_refusal(e) and ours and not (folder / "logs").exists():
                lock.unlink(missing_ok=True)  # while still locked: afterwards the file may belong to another run
                remove_empty(missing)
            raise


def is_refusal(error: BaseException) -> bool:
    """Return whether ``error`` is user-fixable or a Ctrl-C, not a bug or a lost process."""
    return isinstance(error, (DINOv2Error, KeyboardInterrupt)) and not isinstance(error, LostProcessError)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the operating system releases it when the process ends.

    Raises:
        LaunchError: another process holds the folder.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(folder / LOCK))
        except files.LockedError as e:
            raise LaunchError(
                f"--output-dir: expected a directory without an active run, got {folder}, which another process is "
                "writing; wait for it, stop it, or choose another directory"
            ) from e
        yield


def changed_keys(before: Mapping[str, Any], cfg: DictConfig) -> list[str]:
    """Return "key: before -> now" for every key that differs from the checkpoint's and may change results or their
    evaluation.

    How the global batch is composed is not a change; for its size see :func:`changed_batch`.

    Args:
        before: values of the checkpoint.
    """
    earlier, now = before["config"], OmegaConf.to_container(cfg)
    changes = []
    for key, field in all_keys().items():
        old, new = _value(earlier, key), _value(now, key)
        matters = field.json_schema_extra["changes_results"] or key.startswith("evaluation.online.")
        if matters and old is not None and old != new and key not in OF_THE_BATCH:
            changes.append(f"{key}: {old} -> {new}")
    return changes


def changed_batch(before: Mapping[str, Any], cfg: DictConfig, world_size: int) -> list[str]:
    """Return "global batch: before -> now", and the new learning rate, if a resume changes the global batch.

    Args:
        before: values of the checkpoint.
    """
    old, how_old = _global_batch(before["config"], before["world_size"])
    new, how_new = _global_batch(OmegaConf.to_container(cfg), world_size)
    if old == new or not old:
        return []
    lr = f"optim.lr, by its square root: {_value(before['config'], 'optim.lr'):.3g} -> {cfg.optim.lr:.3g}"
    return [f"global batch: {old} ({how_old}) -> {new} ({how_new})", lr]


def changed_data(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """Return "images: before -> now" if the data differ from the checkpoint's, and other changes that alter pixels.

    Both mappings have ``images``, ``digest`` and ``resize`` (the library that resizes crops on this machine).
    """
    changes = []
    if not before or not now or before == now:
        return changes
    if before["images"] != now["images"]:
        changes.append(f"images found: {before['images']:,} -> {now['images']:,}, so that others are drawn")
    elif before["digest"] and now["digest"] and before["digest"] != now["digest"]:
        changes.append("images found: as many, but different ones")
    kernels = [found.get("resize") for found in (before, now)]
    if all(kernels) and kernels[0] != kernels[1]:
        changes.append(
            f"crops resized by: {' -> '.join(kernels)}, as this machine's processor is of another kind, which changes "
            "pixels by some hundredths of a level"
        )
    return changes


def _global_batch(config: Mapping[str, Any], world_size: int) -> tuple[int, str]:
    """Return images per step and the factors of that product; 0 if ``config`` does not give them."""
    batch, accumulated = _value(config, "train.batch_size_per_gpu"), _value(config, "optim.accumulation_steps") or 1
    numbers = (batch, accumulated, _value(config, "optim.lr"))
    if not all(isinstance(number, int | float) for number in numbers):
        return 0, ""
    how = f"{batch} per process x {world_size} processes" + (f" x {accumulated} accumulated" if accumulated > 1 else "")
    return batch * world_size * accumulated, how


def _value(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of ``config`` at the dotted ``key`` as written, with references unresolved."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
