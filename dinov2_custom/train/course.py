"""The length of a run and its position in it: in epochs, in steps, or by the clock."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

# Number of schedule points of a run limited by time, whose number of steps is not known in advance.
TICKS = 100_000


class RunLength(NamedTuple):
    """Length of a run: ``epoch_length`` iterations per epoch, ``total`` points of its schedules.

    ``global_batch``: images per step. A point is one iteration or, in a run limited by time, 1 / ``TICKS`` of
    ``max_hours``. ``epochs`` is ``optim.epochs``; ``stretched``: the run has another length, and lengths given in
    epochs keep their share of it.
    """

    epoch_length: int
    total: int
    global_batch: int
    epochs: float
    stretched: bool = False
    max_hours: float = 0.0

    def iterations(self, length: float | str) -> int:
        """Convert (fractional) epochs, or a share of the run such as "10%", to points of the schedules, rounded."""
        if isinstance(length, str):
            return round(float(length.rstrip("%")) / 100 * self.total)
        return round(length / self.epochs * self.total if self.stretched else length * self.epoch_length)


def run_length(cfg, num_images: int, world_size: int) -> RunLength:
    """Resolve ``train.max_hours``, ``train.max_steps`` or ``optim.epochs`` (the first set) and the epoch length.

    An epoch is ``train.OFFICIAL_EPOCH_LENGTH`` iterations, or with ``auto`` one pass over ``num_images``.
    """
    global_batch = cfg.train.batch_size_per_gpu * world_size * cfg.optim.accumulation_steps
    length = cfg.train.OFFICIAL_EPOCH_LENGTH
    epoch_length = math.ceil(num_images / global_batch) if length == "auto" else int(length)
    stretched, max_hours = True, cfg.train.max_hours
    if max_hours:
        total = TICKS
    elif cfg.train.max_steps:
        total = cfg.train.max_steps
    else:
        total, stretched = max(1, round(cfg.optim.epochs * epoch_length)), False
    return RunLength(epoch_length, total, global_batch, cfg.optim.epochs, stretched, max_hours)


class Course:
    """The position of a run between its first and its last step, the same in all processes.

    A run limited by time uses the main process's clock; all processes receive it with the reductions of a step
    (:meth:`read_clock`, :meth:`update`), one step late. Time between a stop and the resume does not count.

    Args:
        state: :meth:`state` of an earlier process, from a checkpoint.
        late: number of steps between a :meth:`read_clock` and the :meth:`update` with its value.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        length: RunLength,
        state: dict[str, Any] | None = None,
        late: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.length, self.late, self._clock = length, late, clock
        self.limit_s = length.max_hours * 3600
        self.elapsed_s = float((state or {}).get("elapsed_s", 0.0))
        self.step_s = float((state or {}).get("step_s", 0.0))
        self.ended_at_h = float((state or {}).get("ended_at_h", 0.0))
        self._began = clock() - self.elapsed_s
        self._steps: deque[float] = deque(maxlen=20)
        self._updates = 0

    def position(self, iteration: int) -> int:
        """Return the index into the schedules of step ``iteration``."""
        if not self.limit_s:
            return iteration
        return min(int(self.elapsed_s / self.limit_s * self.length.total), self.length.total - 1)

    def is_last(self, iteration: int) -> bool:
        """Return whether ``iteration`` is the run's last step: no time is left for another one after it."""
        if not self.limit_s:
            return iteration >= self.length.total - 1
        return self.elapsed_s + (self.late + 2) * self.step_s > self.limit_s

    def is_finished(self, iteration: int) -> bool:
        """Return whether the run is complete, so that step ``iteration`` need not run."""
        if not self.limit_s:
            return iteration >= self.length.total
        return self.ended_at_h >= self.length.max_hours

    def read_clock(self) -> float:
        """Return the total training time in seconds by this process's clock."""
        return self._clock() - self._began if self.limit_s else 0.0

    def update(self, seconds: float) -> None:
        """Set the time to the main process's ``seconds``; the step time is the mean of the latest 20."""
        if not self.limit_s or seconds <= self.elapsed_s:
            return
        self._updates += 1
        if self._updates == 2:
            self._steps.clear()  # the first step also compiles, starts processes and fills caches
        self._steps.append(seconds - self.elapsed_s)
        self.step_s, self.elapsed_s = fmean(self._steps), seconds

    def expected_total(self, iteration: int) -> float:
        """Return the total iterations of the run; an estimate from the mean speed if the run is limited by time."""
        if not self.limit_s:
            return self.length.total
        return iteration * self.limit_s / self.elapsed_s if self.elapsed_s else math.inf

    def left_s(self) -> float:
        """Return the remaining seconds of a run limited by time."""
        return max(0.0, self.limit_s - self.elapsed_s)

    def state(self, ended: bool = False) -> dict[str, Any]:
        """Return what a checkpoint stores to continue from here; ``ended``: after the last step."""
        ended_at_h = self.length.max_hours if ended else 0.0
        state = {"elapsed_s": self.elapsed_s, "step_s": self.step_s, "ended_at_h": ended_at_h}
        return {"course": state} if self.limit_s else {}

    def describe(self, num_images: int) -> str:
        """Describe the run's length, also in images and in passes over ``num_images``."""
        length = self.length
        epoch = f"epoch={length.epoch_length:,} iterations = {length.epoch_length * length.global_batch:,} images"
        if self.limit_s:
            done = f", {in_words(self.elapsed_s)} of it done" if self.elapsed_s else ""
            return f"{epoch}, {in_words(self.limit_s)} of training{done}"
        passes = length.total * length.global_batch / num_images
        whole = f"{length.total / length.epoch_length:.4g}" if length.stretched else f"{length.epochs:g}"
        return f"{epoch}, {whole} epochs = {length.total:,} iterations = {passes:.1f} passes over the data"

    def how_to_extend(self) -> str:
        """Return what to change to continue a finished run."""
        if self.limit_s:
            return f"all {in_words(self.limit_s)} of training have passed; raise train.max_hours to continue"
        key = "train.max_steps" if self.length.stretched else "optim.epochs"
        return f"all {self.length.total:,} iterations are done; raise {key} to continue"


def in_words(seconds: float) -> str:
    """Format a duration in a suitable unit: ``48 s``, ``12.5 min``, ``7.25 h``."""
    size, unit = next(((s, u) for s, u in ((3600, "h"), (60, "min")) if seconds >= s), (1, "s"))
    return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
