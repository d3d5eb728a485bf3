"""Make a configuration's paths absolute, so that a run's config.yaml means the same from any working directory.

Not the meaning of dataset strings (``data/spec.py``). Read `with_absolute_paths` first.
"""

import re
from pathlib import Path
from typing import Any

KEYS = ("train.dataset_path", "train.path_preserved", "student.pretrained_weights", "MODEL.WEIGHTS")
_NAMES = ("root", "path", "extra")  # options of a dataset that are paths
_OPTION = re.compile(r"""(:(?:root|path|extra)=)("[^"]*"|'[^']*'|[^:]*)""")
_DATASET = re.compile(r"\w+:\w+=")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values`, by dotted key, with relative paths to what exists made absolute; all else as it is."""
    return {key: _absolute(value) if key in KEYS else value for key, value in values.items()}


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    if isinstance(value, dict):
        return {key: _absolute(one) if key in _NAMES else one for key, one in value.items()}
    if not isinstance(value, str) or not value or _URL.match(value):
        return value
    path = Path(value).expanduser()
    if path.exists() or (path.parent.is_dir() and any(mark in path.name for mark in "{*[")):
        return str(path.absolute())
    return _OPTION.sub(_absolute_option, value) if _DATASET.match(value) else value


def _absolute_option(option: re.Match) -> str:
    text = option[2]
    quote = text[:1] if text[:1] in ("'", '"') else ""
    plain = _absolute(text.strip(quote) if quote else text)
    if not quote and text != plain and (":" in plain or "=" in plain):
        quote = '"'  # the working directory's name brought it in
    return f"{option[1]}{quote}{plain}{quote}"
