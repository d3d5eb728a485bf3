"""A progress bar with rate and time left on a terminal or in a notebook, and plain log lines elsewhere.

The bar is tqdm's, on stderr. The console handler of ``setup.py`` clears the bar while it writes, so that log lines and
the bar do not mix on the same terminal.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import ModuleType
from typing import Any, TextIO

from dinov2_custom import distributed

logger = logging.getLogger("dinov2")

# for a loop limited by time: percentage and time left refer to that time; the text after the bar has the iterations
BY_THE_CLOCK = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
_open_bars: list[ProgressBar] = []


class ProgressBar:
    """A bar on ``stream``, a terminal, or in a notebook's cell; elsewhere, and in processes other than the main one, no
    method has any effect.

    Args:
        total: total number of steps, or None if unknown; seconds with :data:`BY_THE_CLOCK`.
        initial: steps already done (for a resumed run).
        description: text before the bar.
        unit: unit of the count.
        stream: where to draw; None for stderr.
        bar_format: tqdm's format; None for the default.
    """

    def __init__(
        self,
        total: float | None,
        *,
        initial: float = 0,
        description: str = "",
        unit: str = "it",
        stream: TextIO | None = None,
        bar_format: str | None = None,
    ):
        stream = sys.stderr if stream is None else stream
        self._bar = None
        text = {"desc": description, "unit": unit, "bar_format": bar_format}
        if not distributed.is_main_process() or stream is None:
            return
        if notebook_display():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, initial=initial, file=stream, **text)
            _open_bars.append(self)
        elif stream.isatty():
            from tqdm import tqdm

            # tqdm draws no bar on a terminal without a known width
            width = {"dynamic_ncols": True} if _has_width(stream) else {"ncols": 100, "nrows": 24}
            self._bar = tqdm(total=total, initial=initial, file=stream, **text, **width)
            _open_bars.append(self)

    @property
    def visible(self) -> bool:
        """Whether the bar is drawn on a terminal and not closed."""
        return self._bar is not None

    @property
    def done(self) -> float:
        """Steps done, including ``initial``."""
        return 0.0 if self._bar is None else self._bar.n

    def update(self, steps: float = 1) -> None:
        """Advance by ``steps``."""
        if self._bar is not None:
            self._bar.update(steps)

    def show(self, text: str) -> None:
        """Show ``text`` after the bar until the next call."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Close the bar, leaving it visible."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            _open_bars.remove(self)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def notebook_display() -> ModuleType | None:
    """Return ``IPython.display`` if this process runs the cells of a notebook, else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return ipython.display if shell is not None and "IPKernelApp" in shell.config else None


def _has_width(stream: TextIO) -> bool:
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def bar_is_open() -> bool:
    """Return whether a bar is currently drawn."""
    return bool(_open_bars)


@contextlib.contextmanager
def bar_set_aside(stream: TextIO) -> Iterator[None]:
    """Clear the open bars while the body writes to ``stream``, then redraw them."""
    if not _open_bars or not stream.isatty():
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=stream):
        yield


def track(
    iterable: Iterable[Any],
    description: str,
    *,
    total: int | None = None,
    unit: str = "it",
    every_s: float = 10.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Any]:
    """Yield from ``iterable`` and report progress: a bar on a terminal, else a log line every ``every_s`` seconds.

    Args:
        total: number of items; None uses ``len(iterable)`` if available.
        clock: monotonic clock in seconds.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    start = last = clock()
    with ProgressBar(total, description=description, unit=unit, stream=stream) as bar:
        for done, item in enumerate(iterable, start=1):
            yield item
            bar.update()
            now = clock()
            if not bar.visible and now - last >= every_s:
                last = now
                logger.info(_line(description, done, total, unit, last - start))


def _line(description: str, done: int, total: int | None, unit: str, seconds: float) -> str:
    rate = done / seconds
    if total is None:
        return f"{description}: {done} {unit}, {rate:.1f} {unit}/s"
    return f"{description}: {done}/{total} {unit}, {rate:.1f} {unit}/s, eta: {duration((total - done) / rate)}"


def duration(seconds: float) -> str:
    """Return ``H:MM:SS``, preceded by days if any."""
    return str(datetime.timedelta(seconds=max(0, int(seconds))))
