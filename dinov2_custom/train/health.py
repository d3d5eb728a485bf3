"""Monitor the health of a run: readable images, a teacher that has not collapsed."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from dinov2_custom.data.samples import with_path
from dinov2_custom.files import append_row, parse_json_object
from dinov2_custom.logging.sinks import Sink
from dinov2_custom.train.step_guard import MAX_STEPS_SCALED
from dinov2_custom.train.views import num_crop_pairs

logger = logging.getLogger("dinov2")
BAD_IMAGES_FILE = "bad_images.jsonl"
COLLAPSE_MARGIN = 0.01
EXPLODING, UNIFORM, SINGLE, DIMENSIONAL = "exploding", "uniform", "single_prototype", "dimensional"
NO_PROGRESS, WORSE = "no_progress", "worse_than_start"
KINDS = (EXPLODING, UNIFORM, SINGLE, DIMENSIONAL, NO_PROGRESS, WORSE)
COLLAPSES = frozenset((EXPLODING, UNIFORM, SINGLE, DIMENSIONAL))  # what ends a run with train.on_collapse=stop
PLATEAU = "plateau"  # a second way to see NO_PROGRESS
# a verdict that holds is the cause of these, which are not called as well
EXPLAINED_BY = {UNIFORM: {EXPLODING}, DIMENSIONAL: {EXPLODING}, NO_PROGRESS: {EXPLODING, UNIFORM}}
ADVICE = {  # kind -> (what is wrong, what to change)
    EXPLODING: (
        "weights, gradients or the loss grow instead of settling",
        "lower optim.base_lr, to a tenth at first, lengthen optim.warmup_epochs, or lower optim.clip_grad",
    ),
    UNIFORM: (
        "the teacher spreads every image evenly over all prototypes",
        "lower teacher.teacher_temp and teacher.warmup_teacher_temp, fewer dino.head_n_prototypes than images, or a "
        "lower optim.base_lr",
    ),
    SINGLE: (
        "one prototype, or a few of them, take every image",
        "train.centering=sinkhorn_knopp, or a higher teacher.teacher_temp and teacher.warmup_teacher_temp",
    ),
    DIMENSIONAL: ("the features lose dimensions", "lower optim.base_lr, raise dino.koleo_loss_weight"),
    NO_PROGRESS: (
        "the student cannot predict from one crop the teacher's prototypes of another crop of the same image",
        "raise the lower ends of crops.global_crops_scale and crops.local_crops_scale, weaken augmentation.*, fewer "
        "dino.head_n_prototypes, or a lower teacher.momentum_teacher",
    ),
    WORSE: (
        "its features are worse than those that it started from",
        "lower optim.base_lr, raise optim.freeze_last_layer_epochs and student.freeze_backbone_epochs, or keep the "
        "weights of the start",
    ),
}
SEE = "docs/monitoring.md, 'A run that does not learn'"
RECIPE = "; with few images or steps train with --config-file configs/small.yaml"
ALIKE = 1.5  # RankMe of features that hardly differ
MAX_RANKME_ROWS = 128  # images per step: enough to distinguish 1 from 20, in 10 to 20 ms


class LearningAlarm(Sink):
    """Call a verdict if a run does not learn, has collapsed or explodes; a sink of rows (``logging/sinks.py``).

    Each kind is called once. Verdicts depend on the rows alone, so that a resumed run only has to :meth:`read` the
    earlier ones. A kind needs a stretch of consecutive rows, :data:`MIN_ROWS` at least. Losses are those of the DINO
    term, divided by the loss of a network with the same output for all images:

    * ``exploding``: the backbone's weights grow while its features lose dimensions (RankMe) and the loss has not
      fallen; or the loss rises above 1; or gradients and loss rise; or steps are skipped as not finite in every row.
    * ``uniform``: the teacher spreads every image over all prototypes: its entropy is ``UNIFORM`` of ln(prototypes).
    * ``single_prototype``: the assignments of a batch lie on a few prototypes; for longer unless RankMe falls, the
      teacher is certain and the entropy does not rise, since the first iterations with centering look similar.
    * ``dimensional``: the features fill less than a quarter of the dimensions (RankMe) that they once filled.
    * ``no_progress``: the loss stays at 1, or stops falling before it was below ``LEARNED``, and ``eval_knn``, if there
      is one, is not above its value before the run by more than chance explains with so many labelled images.
    * ``worse_than_start``: ``eval_knn``, else ``eval_rankme``, is below its value before the run, kNN by more than
      chance explains, and does not rise fast enough to reach it soon.

    An untrained network has a loss of 1, too. Until the loss has been below ``LEARNED``, ``uniform`` and
    ``no_progress`` need ``STRETCH`` of the run, and twice as long while the entropy or the loss falls (for
    ``no_progress`` also while RankMe rises).

    Args:
        num_prototypes: K, prototypes of the monitored head.
        flat_loss: DINO loss if every image is spread evenly; None: there is no such loss, the entropy is used instead.
        total: maps an iteration to the run's length in iterations, as far as known then.
        trained_start: whether the run started from trained weights. Random features first get worse in good runs, too:
            without trained weights, ``worse_than_start`` counts evaluations from when the loss is below ``LEARNED``.
        name_recipe: whether verdicts name the recipe for few images and steps, which the run does not follow.
        announce: called with {"verdict": kinds} whenever they change, for the destinations that show a summary.

    Attributes:
        has_collapsed: whether a row given to :meth:`log`, not :meth:`read`, completed a kind of :data:`COLLAPSES`.
    """

    name, retries = "alarm", True
    MIN_ROWS, STRETCH, LEARNED, UNIFORM, FALL = 10, 0.2, 0.97, 0.98, 0.003
    RANK_LOSS, RANK_RISE, FEW_PROTOTYPES, CERTAIN = 4.0, 1.1, 0.4, 0.4
    GROWTH, LESS_RANK, FEWER_RANK, RISE = 1.1, 0.8, 0.7, 10.0
    SETTLED = 90  # iterations, by when the centre and the medians of rows have forgotten the first steps
    MIN_EVALS, KNN_LOSS, RANKME_LEFT = 4, 0.02, 0.5

    def __init__(
        self,
        num_prototypes: int,
        flat_loss: float | None,
        total: Callable[[int], float],
        announce: Callable[[dict[str, str]], None] = lambda facts: None,
        trained_start: bool = False,
        name_recipe: bool = True,
    ) -> None:
        self.uniform_entropy, self.flat_loss, self.total = math.log(num_prototypes), flat_loss, total
        self.announce, self.trained_start = announce, trained_start
        self.see = SEE + (RECIPE if name_recipe else "")
        self.stretches: dict[str, list[dict[str, float]]] = {kind: [] for kind in (*KINDS, PLATEAU)}
        self.num_rows = self.num_flat = 0
        self.has_learned, self.has_collapsed, self.is_better = False, False, False
        self.best_rank, self.best_loss = 0.0, math.inf
        self.first: dict[str, float] = {}
        self.skipped = 0.0
        self.weight, self.ranks = 0.0, deque([math.inf], maxlen=self.MIN_ROWS)
        self.norms: deque[dict[str, float]] = deque(maxlen=self.MIN_ROWS)
        self.lowest_norms: dict[str, float] = {}
        self.called: dict[str, str] = {}

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Record the row of iteration ``step``; warn if it completes the first stretch of a kind."""
        new = self.check(row, self.total(step))
        for kind in new:
            logger.warning(self.called[kind])
        if new:
            self.has_collapsed |= bool(COLLAPSES & set(new)) or (self.has_learned and NO_PROGRESS in new)
            self.announce({"verdict": ", ".join(self.called)})

    def read(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Record the rows from before a resume."""
        for row in rows:
            self.check(row, self.total(rows[-1]["iteration"]))

    def check(self, row: Mapping[str, float], total: float) -> list[str]:
        """Record one row of a run of ``total`` iterations; return the kinds of :data:`KINDS` to warn about now."""
        if "teacher_entropy" not in row or not self.uniform_entropy:  # another program's row, or a single prototype
            return []
        self.num_rows += 1
        row = dict(row) | {"loss": self._share_of_flat(row)}
        self.first = self.first or row
        self.has_learned |= row["loss"] < self.LEARNED
        self.best_rank = max(self.best_rank, row.get("rankme", 0.0))
        self.best_loss = min(self.best_loss, row["loss"])
        new = []
        for kind, is_seen in self._found(row).items():
            stretch = self.stretches[kind]
            if not is_seen:
                stretch.clear()
                continue
            stretch.append(row)
            label = NO_PROGRESS if kind == PLATEAU else kind
            explained = any(self.stretches[by] for by in EXPLAINED_BY.get(label, ()) if by in self.called)
            if label not in self.called and not explained and self._is_long(kind, total):
                self.called[label] = self._describe(label, stretch)
                new.append(label)
        return new

    def final_verdicts(self) -> dict[str, str]:
        """Return the verdicts to repeat at the end, by kind: those that still hold, or held for most of the run.

        Without those that another of them explains, also if that one was called later.
        """
        most = not self.has_learned or 2 * self.num_flat > self.num_rows
        found = {}
        for kind, words in self.called.items():
            stretch = self.stretches[kind]
            if kind == NO_PROGRESS:
                stretch = max(stretch, self.stretches[PLATEAU], key=len)
            if stretch or (kind in (UNIFORM, NO_PROGRESS) and most):
                found[kind] = self._describe(kind, stretch) if stretch else words
        hold = {kind for kind in found if self.stretches[kind]}
        return {kind: words for kind, words in found.items() if not EXPLAINED_BY.get(kind, set()) & hold}

    def _found(self, row: dict[str, float]) -> dict[str, bool]:
        """Return which kinds ``row`` belongs to; without a kind that it says nothing about."""
        loss, entropy = row["loss"], row["teacher_entropy"]
        crops = 2 * row.get("current_batch_size", math.inf)
        possible = min(self.uniform_entropy, math.log(crops) + entropy)  # entropy of a batch that shares no prototype
        flat = 1 - COLLAPSE_MARGIN <= loss <= 1.05  # it begins above that, and falls in any run
        self.num_flat += loss >= 1 - COLLAPSE_MARGIN
        found = {
            EXPLODING: self._explodes(row),
            UNIFORM: entropy >= self.UNIFORM * self.uniform_entropy and loss >= self.UNIFORM,
            SINGLE: row["prototype_entropy"] < self.FEW_PROTOTYPES * possible,
            DIMENSIONAL: row.get("rankme", math.inf) < self.best_rank / self.RANK_LOSS,
            NO_PROGRESS: flat,
            PLATEAU: loss >= self.LEARNED,
        }
        if (measure := _measure(row)) and (self.trained_start or self.has_learned):
            now, start = row[f"eval_{measure}"], row[f"start_{measure}"]
            found[WORSE] = now < (start - self._knn_loss(row) if measure == "knn" else start * self.RANKME_LEFT)
        if _measure(row) == "knn":
            self.is_better = row["eval_knn"] > row["start_knn"] + self._knn_loss(row)
        if self.is_better:  # whatever the loss is
            found |= {NO_PROGRESS: False, PLATEAU: False}
        return found

    def _knn_loss(self, row: Mapping[str, float]) -> float:
        """Return how far kNN may be below its start by chance: up to two standard errors of a proportion."""
        return max(self.KNN_LOSS, row.get("knn_images", math.inf) ** -0.5)

    def _explodes(self, row: dict[str, float]) -> bool:
        skipped, self.skipped = self.skipped, row.get("skipped_steps", 0)
        if self.skipped > max(skipped, MAX_STEPS_SCALED):  # a loss scale that is too high skips some of the first steps
            return True
        norms = {name: value for name, value in row.items() if name.startswith("grad_norm_")}
        if not all(map(math.isfinite, (row["loss"], *norms.values()))):
            return True
        rises = row["loss"] > 1.05 and row["loss"] > 1.1 * self.best_loss
        steep = any(value > self.RISE * self.lowest_norms.get(name, math.inf) for name, value in norms.items())
        self.norms.append(norms)
        if len(self.norms) == self.MIN_ROWS:
            for name in norms:
                mean = fmean(earlier.get(name, math.inf) for earlier in self.norms)
                self.lowest_norms[name] = min(mean, self.lowest_norms.get(name, math.inf))
        weight, before = row.get("weight_norm_backbone", 0.0), self.weight
        self.weight = weight
        self.ranks.append(row.get("rankme", math.inf))
        least = self.LESS_RANK * self.first.get("rankme", 0.0)
        shrunk = self.ranks[-1] < least or EXPLODING in self.called
        grows_on = weight > before and (min(self.ranks) < least or bool(self.stretches[EXPLODING]))
        grown = weight > self.GROWTH * self.first.get("weight_norm_backbone", math.inf)
        is_bad = grown and row["loss"] >= self.LEARNED and (shrunk or grows_on)
        return is_bad or rises or (steep and row["loss"] > 1.1 * self.best_loss)

    def _share_of_flat(self, row: Mapping[str, float]) -> float:
        """Return the DINO loss of ``row``, else the teacher's entropy, divided by its value for an even spread."""
        if self.flat_loss is None:
            return row["teacher_entropy"] / self.uniform_entropy
        return (row.get("dino_local_crops_loss", 0.0) + row.get("dino_global_crops_loss", math.nan)) / self.flat_loss

    def _is_long(self, kind: str, total: float) -> bool:
        """Return whether the stretch of ``kind`` is long enough for a verdict."""
        stretch = self.stretches[kind]
        span = stretch[-1]["iteration"] - stretch[0]["iteration"]
        if kind == WORSE:
            measure = _measure(stretch[-1])
            before, after = _halves(stretch, f"eval_{measure}")
            recovers = 2 * (after - before) >= stretch[-1][f"start_{measure}"] - after
            return len(stretch) >= self.MIN_EVALS and not recovers
        if len(stretch) < self.MIN_ROWS:
            return False
        if kind == SINGLE:
            before, after = _halves(stretch[-2 * self.MIN_ROWS :], "prototype_entropy")
            shrinks = not after > before and stretch[-1].get("rankme", math.inf) < self.FEWER_RANK * self.best_rank
            if shrinks and stretch[-1]["teacher_entropy"] < self.CERTAIN:
                return span >= min(self.STRETCH * total / 2, self.SETTLED)
            return span >= min(self.STRETCH * total * 3, 2 * self.SETTLED)
        if kind == PLATEAU:
            return span >= 2 * self.STRETCH * total and not self._falls_still(stretch, total)
        if kind not in (UNIFORM, NO_PROGRESS) or self.has_learned:
            return True
        if span < self.STRETCH * total:
            return False
        before, after = _halves(stretch, "teacher_entropy")
        grows = after < before - COLLAPSE_MARGIN * self.uniform_entropy
        grows |= stretch[-1]["loss"] < min(1.0, _halves(stretch, "loss")[0]) - COLLAPSE_MARGIN
        if kind == NO_PROGRESS:
            rank_before, rank_after = _halves(stretch, "rankme")
            grows |= rank_after > self.RANK_RISE * rank_before
        return span >= self.STRETCH * total * (1 + grows)

    def _falls_still(self, stretch: list[dict[str, float]], total: float) -> bool:
        """Return whether the loss fell over the last ``STRETCH`` of the run, looked at every half per cent of it."""
        if len(stretch) % (1 + len(stretch) // 200):
            return True
        since = stretch[-1]["iteration"] - self.STRETCH * total
        recent = stretch[bisect_left(stretch, since, key=lambda row: row["iteration"]) :]
        before, after = _halves(recent, "loss")
        return not after > before - self.FALL

    def _describe(self, kind: str, stretch: list[dict[str, float]]) -> str:
        first, last = stretch[0], stretch[-1]
        reason, advice = self._reason(kind, last)
        never_learned = kind in (UNIFORM, NO_PROGRESS) and not self.has_learned
        what = {EXPLODING: "explodes", WORSE: "makes the network worse"}.get(kind, "has collapsed")
        what = "does not learn" if never_learned else what
        names = ("teacher_entropy", "prototype_entropy", "rankme", "grad_norm_backbone", "weight_norm_backbone")
        changes = ", ".join(f"{n} {first[n]:.4g} -> {last[n]:.4g}" for n in names if n in first and n in last)
        return (
            f"verdict {kind}: the run {what}: {reason}; from iteration={first['iteration']} to {last['iteration']} the "
            f"DINO loss was {min(r['loss'] for r in stretch):.3f} or more of its value for an even spread, with "
            f"ln(prototypes)={self.uniform_entropy:.3f}: {changes}; what to do: {advice}; {self.see}"
        )

    def _reason(self, kind: str, last: dict[str, float]) -> tuple[str, str]:
        """Return what is wrong and what to change."""
        if kind in (UNIFORM, NO_PROGRESS) and last.get("rankme", math.inf) < ALIKE:
            advice = f"student.layerscale=1 in a short run, or a longer run; else {ADVICE[kind][1]}"
            return "the features of all images are nearly the same", advice
        if kind == NO_PROGRESS and self.stretches[WORSE]:
            return f"{ADVICE[kind][0]}, and its features are worse than those that it started from", ADVICE[WORSE][1]
        if kind == NO_PROGRESS and last["teacher_entropy"] >= self.UNIFORM * self.uniform_entropy:
            kind = UNIFORM
        if kind == DIMENSIONAL:
            filled = f"{last.get('rankme', 0):.3g} dimensions (RankMe), they filled {self.best_rank:.3g}"
            return f"the features fill {filled}", ADVICE[kind][1]
        if kind == WORSE and (measure := _measure(last)):
            was = f"{measure} {last[f'eval_{measure}']:.4g}, at the start {last[f'start_{measure}']:.4g}"
            if measure == "knn" and "knn_images" in last:
                was += f" (with {last['knn_images']:,.0f} images, {self._knn_loss(last):.2g} may be chance)"
            return f"its features are worse than those that it started from: {was}", ADVICE[kind][1]
        return ADVICE[kind]


def _measure(row: Mapping[str, float]) -> str:
    """Return what ``row`` compares with the start: ``knn``, else ``rankme``, or "" if it has no comparison."""
    return next((name for name in ("knn", "rankme") if f"eval_{name}" in row and f"start_{name}" in row), "")


def _halves(rows: Sequence[Mapping[str, float]], name: str) -> tuple[float, float]:
    """Return the means of ``name`` over the first and the second half of ``rows``; NaN where it is missing."""
    values, half = [row.get(name, math.nan) for row in rows], len(rows) // 2
    return fmean(values[:half] or [math.nan]), fmean(values[half:] or [math.nan])


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
    rows, columns = features.shape
    tall = features if rows > columns else features.T  # with the same singular values; LAPACK is up to 3 times faster
    singular = torch.linalg.svdvals(tall.double())
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
