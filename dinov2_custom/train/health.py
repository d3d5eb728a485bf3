"""Is the run still healthy: readable images, a teacher that has not collapsed. Finite numbers: ``step_guard.py``."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from dinov2_custom.data.train_samples import with_path
from dinov2_custom.files import parse_json_object
from dinov2_custom.logging import append_row

logger = logging.getLogger("dinov2")
BAD_IMAGES_FILE = "bad_images.jsonl"
COLLAPSE_MARGIN = 0.01


class CollapseAlarm:
    """Warn once when the teacher spreads every image evenly over all prototypes, and once when one prototype takes all.

    Args:
        num_prototypes: K of the head whose assignments are watched.
        patience: reports in a row before the warning; an untrained teacher is nearly uniform too.
    """

    def __init__(self, num_prototypes: int, patience: int = 10) -> None:
        self.uniform_entropy = math.log(num_prototypes)
        self.patience = patience
        self.in_a_row = {"uniform": 0, "single": 0}

    def check(self, diagnostics: dict[str, float], iteration: int) -> str | None:
        """Read one report; return the kind of collapse when it is being warned of, else None."""
        if not diagnostics:
            return None
        seen = {
            "uniform": diagnostics["teacher_entropy"] > (1 - COLLAPSE_MARGIN) * self.uniform_entropy,
            "single": diagnostics["prototype_entropy"] < COLLAPSE_MARGIN * self.uniform_entropy,
        }
        advice = {
            "uniform": "every image spread evenly over all prototypes, the loss sits at ln(prototypes) = "
            f"{self.uniform_entropy:.3f}; lower optim.base_lr or teacher.teacher_temp",
            "single": "one prototype takes every image; use train.centering=sinkhorn_knopp",
        }
        for kind, is_seen in seen.items():
            self.in_a_row[kind] = self.in_a_row[kind] + 1 if is_seen else 0
            if self.in_a_row[kind] == self.patience:
                logger.warning(f"collapsed iteration={iteration}: {advice[kind]}")
                return kind
        return None


class BadImageLog:
    """Append each unreadable image once, with its reason, to a JSON-lines file, and count them.

    What is in the file from before counts; it is read at the first bad image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: set[str] | None = None

    def __call__(self, name: str, reason: str) -> None:
        if self.seen is None:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            self.seen = {row["path"] for line in lines if isinstance((row := _parse(line)).get("path"), str)}
        if name in self.seen:
            return
        self.seen.add(name)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_row(self.path, {"path": name, "reason": reason})
        logger.warning(f"unreadable image skipped total={len(self.seen)}: {with_path(name, reason)}")


def _parse(line: str) -> dict:
    try:
        return parse_json_object(line)
    except ValueError:  # torn by a kill
        return {}
