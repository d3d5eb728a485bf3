"""What a user means by a run: its newest teacher, its config.yaml, and its name for what is made from it.

Not the reading of weights (``utils/weights``). Without torch, so that command lines can ask it. Read
:func:`find_weights` first.
"""

from __future__ import annotations

import re
from pathlib import Path

from dinov2_custom.errors import CheckpointError
from dinov2_custom.utils.paths import path_of_file_url

LOCK = ".lock"  # held by the process that writes into a run directory
MARKER = "checkpoint.json"  # the last file of a training checkpoint
LAST = "last_checkpoint"
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,250}", re.ASCII)  # one file's, in this folder
_NUMBERED = re.compile(r"(?:training|manual)_(\d+)$")


def find_weights(source: str) -> str:
    """Return the weights that ``source`` means; of a run directory the newest teacher, else the last checkpoint.

    Files, URLs, training checkpoints and folders as Hugging Face writes them stand for themselves.

    Raises:
        CheckpointError: a directory without any.
    """
    source = path_of_file_url(str(source))
    if "://" in source:
        return source
    path = Path(source).expanduser()
    hugging_face = any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
    if not path.is_dir() or is_complete(path) or hugging_face:
        return str(path)
    teachers = [path / "teacher_checkpoint.pth", *path.glob("eval/*/teacher_checkpoint.pth")]
    found = [(int(match[1]) if (match := _NUMBERED.search(t.parent.name)) else -1, t) for t in teachers if t.is_file()]
    if found:
        return str(max(found)[1])
    if (last := last_checkpoint(path)) and (path / last).exists():
        return str(path / last)
    raise CheckpointError(
        f"expected a weight file or a run directory, got {path} without eval/*/teacher_checkpoint.pth or "
        "last_checkpoint; give the file"
    )


def last_checkpoint(folder: Path) -> str:
    """Return the name in ``folder`` that its file ``last_checkpoint`` holds, "" where it holds none."""
    try:
        name = (folder / LAST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return ""
    return name if _FILE_NAME.fullmatch(name) else ""


def is_complete(folder: Path) -> bool:
    """Return whether ``folder`` is a training checkpoint that has its marker."""
    return (folder / MARKER).is_file()


def run_config_near(weights: str) -> Path | None:
    """Return the config.yaml of the run directory that ``weights`` lies in (up to three folders above), or None."""
    if "://" in str(weights):
        return None
    path = Path(weights).expanduser().absolute()
    return next((f / "config.yaml" for f in list(path.parents)[:4] if (f / "config.yaml").is_file()), None)


def default_output(command: str, source: str) -> Path:
    """Return ./outputs/<command>/<name of the run that ``source`` is or lies in, else of the file>.

    Raises:
        CheckpointError: a directory without weights.
    """
    weights = find_weights(source)
    config = run_config_near(weights)
    return Path("outputs") / command / (config.parent.name if config else Path(weights).stem)
