"""Make a configuration's paths absolute, so that a run's config.yaml means the same from any working directory.

And tell which of them lead nowhere. Not the meaning of dataset strings (``data/spec.py``). Read `with_absolute_paths`.
"""

import os
import re
from pathlib import Path
from typing import Any

KEYS = ("train.dataset_path", "train.path_preserved", "student.pretrained_weights", "MODEL.WEIGHTS")
_NAMES = ("root", "path", "extra")  # options of a dataset that are paths
_OPTION = re.compile(r"""(:(?:root|path|extra)=)("[^"]*"|'[^']*'|[^:]*)""")
_DATASET = re.compile(r"\w+:\w+=")
_FIXED = re.compile(r"[^{*?[]*")  # of a pattern, before what stands for several
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values`, by dotted key, with relative paths to what exists made absolute; all else as it is."""
    return {key: _absolute(value) if key in KEYS else value for key, value in values.items()}


def absent(value: Any) -> list[str]:
    """Return the paths in `value`, of one of `KEYS` or a dataset string, where this machine has nothing."""
    if isinstance(value, list):
        return [path for one in value for path in absent(one)]
    if isinstance(value, dict):
        return [path for name in _NAMES for path in absent(value.get(name))]
    if not isinstance(value, str) or os.sep not in value or _URL.match(value) or _absolute(value) != value:
        return []
    if Path(value).expanduser().exists():
        return []
    if _DATASET.match(value):
        return [path for _, text in _OPTION.findall(value) for path in absent(text.strip("\"'"))]
    fixed = _FIXED.match(value)[0]
    return [] if fixed != value and os.path.isdir(os.path.dirname(fixed)) else [value]


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    if isinstance(value, dict):
        return {key: _absolute(one) if key in _NAMES else one for key, one in value.items()}
    if not isinstance(value, str) or not value or _URL.match(value):
        return value
    path = Path(value).expanduser()
    fixed = _FIXED.match(str(path))[0]
    if path.exists() or (fixed != str(path) and os.path.isdir(os.path.dirname(fixed) or ".")):
        return str(path.absolute())
    return _OPTION.sub(_absolute_option, value) if _DATASET.match(value) else value


def _absolute_option(option: re.Match) -> str:
    text = option[2]
    quote = text[:1] if text[:1] in ("'", '"') else ""
    plain = _absolute(text.strip(quote) if quote else text)
    if not quote and text != plain and (":" in plain or "=" in plain):
        quote = '"'  # the working directory's name brought it in
    return f"{option[1]}{quote}{plain}{quote}"
