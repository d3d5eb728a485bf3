"""Files of a run directory: its newest teacher and config.yaml, and the name of outputs derived from it.

Torch-free, so that command lines can import it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from dinov2_custom.errors import CheckpointError, command
from dinov2_custom.utils.paths import path_of_file_url, without_credentials

LOCK = ".lock"  # held by the process that writes to a run directory
MARKER = "checkpoint.json"  # the last file of a training checkpoint
LAST = "last_checkpoint"
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,250}", re.ASCII)  # of a file in this folder
_SHARD = re.compile(r"(model_(?:\d{7,}|final))\.rank_(\d+)\.pth")  # upstream's
BEST = "best"  # in ``eval``: the teacher with the best value of evaluation.online
_NUMBERED = re.compile(r"(?:training|manual)_(\d+)$")


def find_weights(source: str) -> str:
    """Return the weights for ``source``; for a run directory its newest teacher, else its last checkpoint.

    Files, URLs, training checkpoints and folders as Hugging Face writes them stand for themselves.

    Raises:
        CheckpointError: the directory has none.
    """
    source = path_of_file_url(str(source))
    if "://" in source:
        return source
    path = Path(source).expanduser()
    hugging_face = any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
    if not path.is_dir() or is_complete(path) or hugging_face:
        return str(path)
    teachers = [path / "teacher_checkpoint.pth", *path.glob("eval/*/teacher_checkpoint.pth")]
    teachers = [t for t in teachers if t != path / "eval" / BEST / "teacher_checkpoint.pth"]  # seldom the newest
    found = [(int(match[1]) if (match := _NUMBERED.search(t.parent.name)) else -1, t) for t in teachers if t.is_file()]
    if found:
        return str(max(found)[1])
    if (last := last_checkpoint(path)) and (path / last).exists():
        return str(path / last)
    if shards := upstream_shards(path):
        raise CheckpointError(
            f"expected a weight file or a run directory of dinov2_custom, got {path} of facebookresearch/dinov2, with "
            f"a file for each process ({shards[0].name}); {how_to_gather(path)}"
        )
    raise CheckpointError(
        f"expected a weight file or a run directory, got {path} without eval/*/teacher_checkpoint.pth or "
        "last_checkpoint; give the file"
    )


def last_checkpoint(folder: Path) -> str:
    """Return the name in ``folder`` that its file ``last_checkpoint`` gives, or ""."""
    try:
        name = (folder / LAST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return ""
    return name if _FILE_NAME.fullmatch(name) else ""


def is_upstream_shard(path: Path) -> bool:
    """Return whether ``path`` is named like a file of :func:`upstream_shards`, of any checkpoint."""
    return _SHARD.fullmatch(path.name) is not None


def upstream_shards(folder: Path) -> list[Path]:
    """Return the files of the newest checkpoint that facebookresearch/dinov2 wrote into ``folder``, by rank.

    Each of its processes writes ``model_<iteration>.rank_<r>.pth``, and names it in ``last_checkpoint.rank_<r>``.
    """
    found: dict[str, dict[int, Path]] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _SHARD.fullmatch(path.name):
            found.setdefault(match[1], {})[int(match[2])] = path
    newest = max(found, key=lambda name: (name == "model_final", name), default="")
    return [path for _, path in sorted(found.get(newest, {}).items())]


def how_to_gather(folder: Path) -> str:
    """Return the instruction for the files of :func:`upstream_shards`."""
    gather = f"{command('run/export/export.py')} {shlex.quote(str(folder))} --to torch --output teacher.pth"
    return f"gather its teacher with `{gather}`, then start elsewhere with student.pretrained_weights=teacher.pth"


def is_complete(folder: Path) -> bool:
    """Return whether ``folder`` is a training checkpoint that has its marker."""
    return (folder / MARKER).is_file()


def run_config_near(weights: str) -> Path | None:
    """Return the config.yaml of the run directory that contains ``weights`` (up to three folders above), or None."""
    if "://" in str(weights):
        return None
    path = Path(weights).expanduser().absolute()
    return next((f / "config.yaml" for f in list(path.parents)[:4] if (f / "config.yaml").is_file()), None)


def default_output(command: str, source: str) -> Path:
    """Return ./outputs/<command>/<name of the run that is or contains ``source``, else of the file>."""
    weights = find_weights(source)
    config = run_config_near(weights)
    return Path("outputs") / command / (config.parent.name if config else Path(without_credentials(weights)).stem)
