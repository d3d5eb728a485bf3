"""Report the metrics of a loop as log lines, and as rows with upstream's keys for ``training_metrics.json``."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch

from dinov2_custom import distributed
from dinov2_custom.files import append_row
from dinov2_custom.logging.progress import BY_THE_CLOCK, ProgressBar, duration
from dinov2_custom.logging.sinks import Sinks
from dinov2_custom.logging.smoothed_value import SmoothedValue, read_pending

logger = logging.getLogger("dinov2")


class MetricLogger:
    """Named series, written as one log line and one row every few iterations.

    Args:
        delimiter: between the fields of a log line.
        output_file: JSON-lines file to which rank 0 appends, or None.
        sinks: further destinations for rows; the caller closes them.
        make: name -> factory of its series; other series are a default :class:`SmoothedValue`.

    Attributes:
        counts: numbers added to the rows unchanged, after the series.
    """

    def __init__(
        self,
        delimiter: str = "\t",
        output_file: str | os.PathLike | None = None,
        sinks: Sinks | None = None,
        make: Mapping[str, Callable[[], SmoothedValue]] | None = None,
    ):
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.make = make or {}
        self._windows: dict[str, Sequence[float | str]] = {}  # for series without a value so far
        self.delimiter = delimiter
        self.output_file = output_file
        self.sinks = sinks
        self.counts: dict[str, float] = {}
        self._ends = False
        self._once: dict[str, float] = {}
        self._report: Callable[[], None] | None = None

    def end_after_this(self) -> None:
        """Make :meth:`log_every` end after the current iteration and write its row."""
        self._ends = True

    def add_to_row(self, **values: float) -> None:
        """Write the row of the current iteration even if it is not due, with ``values`` in it and in no other row."""
        self._once |= values

    def write_now(self) -> None:
        """Write the line and row of the current iteration of :meth:`log_every` now, if they are due.

        Call this before writing anything that must not be on disk earlier, such as a checkpoint. Time spent afterwards
        is attributed to the next iteration.
        """
        report, self._report = self._report, None
        if report is not None:
            report()

    def update(self, **values: float | torch.Tensor) -> None:
        """Append one value to each named series; see :meth:`SmoothedValue.update` for tensors."""
        for name, value in values.items():
            self._meter(name).update(value)

    def _meter(self, name: str) -> SmoothedValue:
        if name not in self.meters:
            self.meters[name] = self.make.get(name, SmoothedValue)()
            self.meters[name].load_state(self._windows.pop(name, ()))
        return self.meters[name]

    def state(self) -> dict[str, Sequence[float | str]]:
        """Return the windows of all series as JSON-compatible values for :meth:`load_state`."""
        read_pending(self.meters.values())
        return self._windows | {name: meter.state() for name, meter in self.meters.items()}

    def load_state(self, windows: Mapping[str, Sequence[float | str]]) -> None:
        """Initialise series from ``windows`` on their first value, so that a resumed run writes the same rows."""
        self._windows = dict(windows)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Use ``meter`` for the series ``name`` instead of a default one."""
        self.meters[name] = meter

    def __getattr__(self, name: str) -> SmoothedValue:
        meters = self.__dict__.get("meters", {})
        if name in meters:
            return meters[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or series {name!r}; series: {', '.join(meters)}")

    def __str__(self) -> str:
        read_pending(self.meters.values())
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Replace the global averages by those over all processes."""
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def dump_in_output_file(self, iteration: int, iter_time: float, data_time: float, **rates: float) -> None:
        """Write the row of ``iteration``: the two times in seconds, the median of each series, then ``rates``."""
        if not distributed.is_main_process() or (self.output_file is None and self.sinks is None):
            return
        read_pending(self.meters.values())
        row: dict[str, Any] = {"iteration": iteration, "iter_time": iter_time, "data_time": data_time}
        row |= {name: meter.median for name, meter in self.meters.items()} | rates | self.counts | self._once
        if self.output_file is not None:
            append_row(self.output_file, row)
        if self.sinks is not None:
            self.sinks.log(iteration, row)

    def log_every(
        self,
        iterable: Iterable[Any],
        print_freq: int,
        header: str | None = None,
        n_iterations: int | None = None,
        start_iteration: int = 0,
        *,
        images_per_iteration: int | None = None,
        speeds: Callable[[float], dict[str, float]] | None = None,
        left_s: Callable[[], float] | None = None,
        limit_s: float = 0.0,
        shown: Sequence[str] = (),
    ) -> Iterator[Any]:
        """Yield the items ``start_iteration`` to ``n_iterations - 1``, time the loop body and write its metrics.

        A log line and a JSON row are written after each iteration that is a multiple of ``print_freq``, and after the
        last. On a terminal there is also a progress bar. Nothing is read from ``iterable`` if the start is not before
        the end. :meth:`end_after_this` makes any iteration the last.

        Args:
            header: first field of a log line.
            n_iterations: end of the loop; None: ``len(iterable)``, or with ``left_s`` until :meth:`end_after_this`.
            images_per_iteration: number over all processes; adds the field ``images/s`` to lines, and to rows
                ``images_per_s``, ``data_wait`` (0..1, the fraction of the time spent waiting for data) and
                ``memory_mib`` (this process's peak CUDA memory, or else resident memory).
            speeds: function from images/s to further fields of lines and rows.
            left_s: function that returns the seconds until the end, out of ``limit_s``, if ``n_iterations`` is unknown.
            shown: series in a log line, if they exist; empty for all. Rows contain all series.
        """
        header = header or ""
        if n_iterations is None and left_s is None:
            if not isinstance(iterable, Sized):
                raise TypeError("log_every: expected n_iterations, or an iterable with a length")
            n_iterations = len(iterable)
        if n_iterations is not None and start_iteration >= n_iterations:
            return
        iter_time, data_time = SmoothedValue(fmt="{avg:.6f}"), SmoothedValue(fmt="{avg:.6f}")
        iteration, start = start_iteration, time.perf_counter()
        self._ends, reported = False, start

        def is_last() -> bool:
            return self._ends or (n_iterations is not None and iteration == n_iterations - 1)

        def report() -> None:
            nonlocal reported
            writes = is_last() or iteration % print_freq == 0 or bool(self._once)
            if writes:
                read_pending(self.meters.values())  # waits for the device, which is part of the iteration's time
            before, reported = reported, time.perf_counter()
            iter_time.update(reported - before)
            if writes:
                rates = _rates(images_per_iteration, iter_time.avg, data_time.avg)
                more = speeds(rates["images_per_s"]) if speeds else {}
                self.dump_in_output_file(iteration, iter_time.avg, data_time.avg, **rates, **more)
                times = [f"time: {iter_time}", f"data: {data_time}"]
                place = _place(iteration, n_iterations, iter_time.global_avg, left_s, limit_s)
                fields = [header, *place, self._line(shown), *times, *_speed(rates, more)]
                count = f"it={iteration}" if limit_s else ""
                bar.show(" ".join(filter(None, (count, self._headline()))))
                logger.info(self.delimiter.join(filter(None, fields)), extra={"shown_by_bar": bar.visible})
                self._once = {}

        place: dict[str, Any] = {"total": n_iterations, "initial": start_iteration}
        if limit_s:
            place = {"total": limit_s, "initial": limit_s - left_s(), "bar_format": BY_THE_CLOCK}
        with ProgressBar(description=header, **place) as bar:
            end = start
            for item in iterable:
                data_time.update(time.perf_counter() - end)
                self._report = report
                yield item
                self.write_now()
                bar.update(limit_s - left_s() - bar.done if limit_s else 1)
                last = is_last()
                iteration += 1
                if last:
                    break
                end = time.perf_counter()
        seconds, done = time.perf_counter() - start, iteration - start_iteration
        logger.info(f"{header} took {duration(seconds)} for {done} iterations ({seconds / max(done, 1):.6f} s / it)")

    def _line(self, shown: Sequence[str]) -> str:
        """Return the series for a log line: the medians of ``shown``, or all series if that is empty."""
        if not shown:
            return str(self)
        read_pending(self.meters.values())
        fields = [f"{name}: {self.meters[name].median:.4g}" for name in shown if name in self.meters]
        return self.delimiter.join(
            [*fields, *(f"{name}: {_short(count)}" for name, count in self.counts.items() if count)]
        )

    def _headline(self) -> str:
        return " ".join(
            f"{name}={self.meters[name].median:.4g}" for name in ("total_loss", "lr") if name in self.meters
        )


def _short(count: float) -> str:
    return f"{count:.4g}" if isinstance(count, float) else str(count)


def _place(
    iteration: int, n_iterations: int | None, iter_s: float, left_s: Callable[[], float] | None, limit_s: float
) -> list[str]:
    """Return the fields of a log line with the position in the loop and the time left."""
    if n_iterations is None:
        share = [f"{1 - left_s() / limit_s:.0%}"] if limit_s else []
        return [" ".join([f"[{iteration}]", *share]), f"eta: {duration(left_s())}"]
    place = f"[{iteration:{len(str(n_iterations))}d}/{n_iterations}]"
    return [place, f"eta: {duration(iter_s * (n_iterations - 1 - iteration))}"]


def _speed(rates: dict[str, float], more: dict[str, float]) -> list[str]:
    """Return the fields of a log line with rates and memory."""
    fields = [f"images/s: {rates['images_per_s']:.1f}"] if rates else []
    fields += [f"{name}: {value:.3g}" for name, value in more.items()]
    if torch.cuda.is_available():
        fields.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
    return fields


def _rates(images: int | None, iter_time: float, data_time: float) -> dict[str, float]:
    if images is None:
        return {}
    seconds = max(iter_time, 1e-9)
    return {"images_per_s": images / seconds, "data_wait": data_time / seconds} | _peak_memory()


def _peak_memory() -> dict[str, float]:
    if torch.cuda.is_available():
        return {"memory_mib": torch.cuda.max_memory_allocated() / 2**20}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 2**10
    return {"memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
