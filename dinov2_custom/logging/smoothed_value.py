"""Running statistics of one series of numbers.

Values may be 0-dim tensors on any device. They remain there and are read together when a line is written, so that an
iteration never waits for the GPU.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

from dinov2_custom import distributed

WINDOW = 20  # number of iterations in the statistics of a loop
_MAX_PENDING = 1000


class SmoothedValue:
    """A series of numbers, with statistics of the finite ones over a window of the latest and over all of them.

    Args:
        window_size: length of the window.
        fmt: format string; may use ``median``, ``avg``, ``global_avg``, ``max`` and ``value``.
        of: computes the number from a tensor passed to :meth:`update`, once that is on the host.
    """

    def __init__(
        self,
        window_size: int = WINDOW,
        fmt: str | None = None,
        of: Callable[[torch.Tensor], float] = torch.Tensor.item,
    ):
        self.of = of
        self.fmt = "{median:.4f} ({global_avg:.4f})" if fmt is None else fmt
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.pending: list[tuple[float | torch.Tensor, int]] = []

    def update(self, value: float | torch.Tensor, num: int = 1) -> None:
        """Append ``value``, with weight ``num`` in the global average.

        A tensor (of one element, or as expected by ``of``) is read later and must not be modified in place.
        """
        self.pending.append((value.detach() if isinstance(value, torch.Tensor) else float(value), num))
        if len(self.pending) >= _MAX_PENDING:
            read_pending([self])

    def synchronize_between_processes(self) -> None:
        """Sum count and total over all processes; the window remains local."""
        read_pending([self])
        if distributed.is_enabled():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            sums = distributed.all_reduce(torch.tensor([self.count, self.total], dtype=torch.float64, device=device))
            self.count, self.total = int(sums[0]), float(sums[1])

    def state(self) -> list[float | str]:
        """Return the window for :meth:`load_state` as JSON-compatible values."""
        read_pending([self])
        return [number if math.isfinite(number) else str(number) for number in self.deque]

    def load_state(self, window: Sequence[float | str]) -> None:
        """Replace the window by ``window``."""
        self.deque.extend(float(number) for number in window)

    def _window(self) -> torch.Tensor:
        """Return the finite numbers of the window, or all if none is finite: skipped steps are not finite."""
        read_pending([self])
        numbers = list(self.deque)
        return torch.tensor([n for n in numbers if math.isfinite(n)] or numbers or [math.nan], dtype=torch.float32)

    @property
    def median(self) -> float:
        """Lower median of the window, rounded to fp32 as in upstream."""
        return self._window().median().item()

    @property
    def avg(self) -> float:
        """Mean of the window, in fp32 as in upstream."""
        return self._window().mean().item()

    @property
    def global_avg(self) -> float:
        """Mean of all values; NaN before the first."""
        read_pending([self])
        return self.total / self.count if self.count else float("nan")

    @property
    def max(self) -> float:
        """Largest number of the window."""
        return max(self._numbers())

    @property
    def value(self) -> float:
        """Latest number."""
        return self._numbers()[-1]

    def _numbers(self) -> list[float]:
        read_pending([self])
        return list(self.deque) or [float("nan")]

    def __str__(self) -> str:
        statistics = {name: getattr(self, name) for name in ("median", "avg", "global_avg", "max", "value")}
        return self.fmt.format(**statistics)


def read_pending(meters: Iterable[SmoothedValue]) -> None:
    """Read the pending values of all ``meters``, with one transfer per device and dtype."""
    meters = list({id(meter): meter for meter in meters}.values())
    tensors: dict[tuple, list[torch.Tensor]] = defaultdict(list)
    for meter in meters:
        for value, _ in meter.pending:
            if isinstance(value, torch.Tensor):
                tensors[value.device, value.dtype].append(value)
    there = {kind: iter(_to_host(group)) for kind, group in tensors.items()}
    for meter in meters:
        for value, num in meter.pending:
            is_tensor = isinstance(value, torch.Tensor)
            number = float(meter.of(next(there[value.device, value.dtype])) if is_tensor else value)
            meter.deque.append(number)
            if math.isfinite(number):
                meter.count += num
                meter.total += number * num
        meter.pending.clear()


def _to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy ``tensors``, all of one device and dtype, to the host."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
