"""One run at a time in a run directory, and what a resumed run does differently from before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dinov2_custom.configs.schema import all_options
from dinov2_custom.errors import LaunchError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the system lets go of it however the process ends.

    Raises:
        LaunchError: another process holds it.
    """
    with open(folder / ".lock", "a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise LaunchError(
                    f"--output-dir: expected a directory without an active run, got {folder}, which another process is "
                    "writing; wait for it, stop it, or choose another directory"
                ) from e
            except OSError:  # a file system without locks: nothing is promised there
                pass
        yield


def changed_keys(folder: Path, cfg: DictConfig) -> list[str]:
    """Return "key: before -> now" of every key that may change results and differs from ``folder``'s config.yaml."""
    path = folder / "config.yaml"
    if not path.exists():
        return []
    before = OmegaConf.load(path)
    changes = []
    for key, option in all_options().items():
        old, new = OmegaConf.select(before, key), OmegaConf.select(cfg, key)
        if option.changes_results and old is not None and old != new and key != "optim.lr":
            changes.append(f"{key}: {old} -> {new}")
    return changes
