"""Monitor the health of a run: readable images, a teacher that has not collapsed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from dinov2_custom.data.samples import with_path
from dinov2_custom.files import append_row, parse_json_object
from dinov2_custom.train.views import num_crop_pairs

logger = logging.getLogger("dinov2")
BAD_IMAGES_FILE = "bad_images.jsonl"
COLLAPSE_MARGIN = 0.01
WHAT_TO_DO = (
    "what to do: docs/monitoring.md, 'A run that does not learn'; with few images or steps train with "
    "--config-file configs/small.yaml"
)
ALIKE = 1.5  # RankMe of features that hardly differ
MAX_RANKME_ROWS = 128  # images per step: enough to distinguish 1 from 20, in 10 to 20 ms


class LearningAlarm:
    """Warn once per kind of failure if a run does not learn or has collapsed; a sink of rows (``logging/sinks.py``).

    Warnings depend on the rows alone, so that a resumed run only has to :meth:`read` the earlier ones.

    Kinds, each over a stretch of rows (:data:`MIN_ROWS` at least):

    * ``flat``: the DINO loss equals that of a network with the same output for all images. An untrained network has
      that
      loss too: until the loss has been below ``LEARNED`` of it, the stretch must be ``STRETCH`` of the run, and twice
      as long while the entropy of the teacher's assignments falls or the features' RankMe rises.
    * ``single``: one prototype takes every image.
    * ``rank``: the features fill less than a quarter of the dimensions (RankMe) that they once filled.

    Args:
        num_prototypes: K, prototypes of the monitored head.
        flat_loss: DINO loss if every image is spread evenly; None: there is no such loss, only entropies are checked.
        total: maps an iteration to the run's length in iterations, as far as known then.
    """

    name, retries = "alarm", True
    MIN_ROWS, STRETCH, LEARNED, RANK_LOSS, RANK_RISE = 10, 0.2, 0.97, 4.0, 1.1

    def __init__(self, num_prototypes: int, flat_loss: float | None, total: Callable[[int], float]) -> None:
        self.uniform_entropy, self.flat_loss, self.total = math.log(num_prototypes), flat_loss, total
        self.stretches: dict[str, list[dict[str, float]]] = {"flat": [], "single": [], "rank": []}
        self.num_rows = self.num_flat = 0
        self.has_learned, self.best_rank = False, 0.0
        self.warned: dict[str, str] = {}

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Record the row of iteration ``step``; warn if it completes the first stretch of a kind."""
        for kind in self.check(row, self.total(step)):
            logger.warning(f"{self.warned[kind]}; {WHAT_TO_DO}")

    def read(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Record the rows from before a resume."""
        for row in rows:
            self.check(row, self.total(rows[-1]["iteration"]))

    def check(self, row: Mapping[str, float], total: float) -> list[str]:
        """Record one row of a run of ``total`` iterations; return the kinds to warn about now."""
        if "teacher_entropy" not in row or not self.uniform_entropy:  # another program's row, or a single prototype
            return []
        self.num_rows += 1
        row = dict(row) | {"loss": self._share_of_flat(row)}
        self.has_learned |= row["loss"] < self.LEARNED
        self.best_rank = max(self.best_rank, row.get("rankme", 0.0))
        found = {
            "flat": row["loss"] >= 1 - COLLAPSE_MARGIN,
            "single": row["prototype_entropy"] < COLLAPSE_MARGIN * self.uniform_entropy,
            "rank": row.get("rankme", math.inf) < self.best_rank / self.RANK_LOSS,
        }
        self.num_flat += found["flat"]
        new = []
        for kind, is_seen in found.items():
            stretch = self.stretches[kind]
            if not is_seen:
                stretch.clear()
                continue
            stretch.append(row)
            if kind not in self.warned and len(stretch) >= self.MIN_ROWS and self._is_long(kind, total):
                self.warned[kind] = self._describe(kind, stretch)
                new.append(kind)
        return new

    def final_warnings(self) -> list[str]:
        """Return the warnings to repeat at the end: those that still hold, or held for most of the run."""
        most = not self.has_learned or 2 * self.num_flat > self.num_rows
        words = []
        for kind, stretch in self.stretches.items():
            if kind in self.warned and (stretch or (kind == "flat" and most)):
                words.append(f"{self._describe(kind, stretch) if stretch else self.warned[kind]}; {WHAT_TO_DO}")
        return words

    def state(self) -> dict[str, str]:
        return {}

    def close(self, exit_code: int) -> None:
        pass

    def _share_of_flat(self, row: Mapping[str, float]) -> float:
        """Return the DINO loss of ``row``, else the teacher's entropy, divided by its value for an even spread."""
        if self.flat_loss is None:
            return row["teacher_entropy"] / self.uniform_entropy
        return (row.get("dino_local_crops_loss", 0.0) + row.get("dino_global_crops_loss", math.nan)) / self.flat_loss

    def _is_long(self, kind: str, total: float) -> bool:
        if kind != "flat" or self.has_learned:
            return True
        stretch = self.stretches[kind]
        first, last = stretch[0]["iteration"], stretch[-1]["iteration"]
        half = len(stretch) // 2
        halves = stretch[:half], stretch[half:]
        before, after = (fmean(r["teacher_entropy"] for r in part) for part in halves)
        is_falling = after < before - COLLAPSE_MARGIN * self.uniform_entropy
        rank_before, rank_after = (fmean(r.get("rankme", math.nan) for r in part) for part in halves)
        is_rising = rank_after > self.RANK_RISE * rank_before
        return last - first >= self.STRETCH * total * (1 + (is_falling or is_rising))

    def _describe(self, kind: str, stretch: list[dict[str, float]]) -> str:
        first, last = stretch[0], stretch[-1]
        flat = "the student cannot predict from one crop the teacher's prototypes of another crop of the same image"
        if last["teacher_entropy"] >= (1 - COLLAPSE_MARGIN) * self.uniform_entropy:
            flat = "the teacher spreads every image evenly over all prototypes"
        if last.get("rankme", math.inf) < ALIKE:
            flat = "the features of all images are nearly the same"
        reasons = {
            "flat": flat,
            "single": "one prototype takes every image",
            "rank": f"the features fill {last.get('rankme', 0):.3g} dimensions (RankMe), they filled "
            f"{self.best_rank:.3g}",
        }
        what = "does not learn" if kind == "flat" and not self.has_learned else "has collapsed"
        changes = ", ".join(
            f"{name} {first[name]:.4g} -> {last[name]:.4g}"
            for name in ("teacher_entropy", "prototype_entropy", "rankme")
            if name in first and name in last
        )
        return (
            f"the run {what}: {reasons[kind]}; from iteration={first['iteration']} to {last['iteration']} the DINO "
            f"loss was {min(r['loss'] for r in stretch):.3f} or more of its value for an even spread, with "
            f"ln(prototypes)={self.uniform_entropy:.3f}: {changes}"
        )


def flat_dino_loss(model) -> float | None:
    """Return the reported DINO loss of a network that spreads every image evenly; None if there is no such loss."""
    if not model.do_dino:
        return None
    num_local = model.num_local_crops
    return math.log(model.num_prototypes) * (2 + 2 * num_local) / num_crop_pairs(num_local)


def rankme(features: Tensor) -> float:
    """Return how many dimensions ``features`` (N, D) fill: 1 for rows that are all alike, at most min(N, D).

    Source: RankMe, Garrido et al. 2023, eq. 1 and 2.
    """
    if not features.isfinite().all():
        return math.nan
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


class BadImageLog:
    """Append each unreadable image once, with its reason, to a JSON-lines file, and count them.

    Entries already in the file count; it is read at the first bad image.
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
    except ValueError:  # a line torn by a kill
        return {}
