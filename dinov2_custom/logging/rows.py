"""A JSON-lines file, one row an iteration (``training_metrics.json``): append, and cut off what a resumed run repeats.

Rows are objects; those of metrics have an ``iteration``. NaN and infinities are written as ``json`` reads them. Read
:func:`append_row` first.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from dinov2_custom.files import parse_json_object

logger = logging.getLogger("dinov2")


def append_row(path: str | os.PathLike, row: dict[str, Any]) -> None:
    """Add ``row`` as one line, in one write; a torn line that a killed run left is ended first."""
    line = (json.dumps(row) + "\n").encode()
    if os.path.exists(path) and os.path.getsize(path):
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
    with open(path, "ab", buffering=0) as file:
        file.write(line)


def truncate_after(path: str | os.PathLike, iteration: int) -> int:
    """Drop the rows whose iteration is >= ``iteration``, and lines that are no rows (torn by a kill).

    To be called by one process. A missing file is left missing, a file with nothing to drop untouched; any other is
    replaced atomically.

    Returns:
        how many lines were dropped.
    """
    path = Path(path)
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_before(line, iteration)]
    dropped = len(lines) - len(kept)
    if dropped:
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        logger.info(f"{path}: dropped {dropped} lines from iteration {iteration} on, kept {len(kept)}")
    return dropped


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of a file, none if there is none; lines that are no rows (torn by a kill) are left out."""
    lines = Path(path).read_bytes().splitlines(keepends=True) if Path(path).exists() else []
    return [json.loads(line) for line in lines if _is_before(line, sys.maxsize)]


def _is_before(line: bytes, iteration: int) -> bool:
    try:
        row = parse_json_object(line, finite=False)
        return line.endswith(b"\n") and row["iteration"] < iteration
    except (ValueError, KeyError, TypeError):
        return False
