"""Stop requests: signals set a flag that the loop reads after a step. Nothing is saved in a handler."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from dinov2_custom.errors import STOP_SIGNALS

logger = logging.getLogger("dinov2")
# A launcher forwards a signal that the scheduler also sent to the whole process group: both are one request.
SAME_REQUEST_S = 1.0


class StopRequests:
    """Context manager that records a signal of ``STOP_SIGNALS`` instead of ending the process.

    A second SIGINT or SIGTERM, more than ``SAME_REQUEST_S`` after the first of its kind, has its previous effect.
    Handlers installed by other code are replaced, and restored on exit. Outside the main thread, where Python accepts
    no handlers, no signal is recorded.

    Attributes:
        signum: the first signal received, 0 before any.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.signum = 0
        self._clock = clock
        self._first: dict[int, float] = {}
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is not threading.main_thread():
            logger.warning("training outside the main thread: signals cannot be turned into a stop after the step")
            return self
        for signum in STOP_SIGNALS:
            former = signal.signal(signum, self._remember)
            self._former[signum] = signal.SIG_DFL if former is None else former  # None: not installed from Python
        return self

    def __exit__(self, *exception: object) -> None:
        while self._former:
            signal.signal(*self._former.popitem())

    def _remember(self, signum: int, frame) -> None:
        first = self._first.setdefault(signum, self._clock())
        if self._clock() - first > SAME_REQUEST_S:
            if signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._former[signum])
                signal.raise_signal(signum)
            return
        if not self.signum:
            self.signum = signum
            again = ", again to stop immediately" if signum in (signal.SIGINT, signal.SIGTERM) else ""
            logger.warning(f"{signal.Signals(signum).name} received: saving after this step{again}")
