"""The results file of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from dinov2_custom import distributed

logger = logging.getLogger("dinov2")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append ``lines`` to ``path``, on the main process only; create its folder."""
    if not distributed.is_main_process():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    logger.info(f"results: {path}")
