"""Skip steps with non-finite numbers: decided on the device, read by the host one step later, without waiting."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2_custom import distributed
from dinov2_custom.errors import NumericsError
from dinov2_custom.utils.transfer import HostCopy, to_device, to_host

logger = logging.getLogger("dinov2")
# A loss scale that starts too high overflows a gradient in each of the first steps, while it is halved.
MAX_STEPS_SCALED = 40
_NUM_SIGNALS = 64


class Flags(NamedTuple):
    """What the processes share in each step: the signal that requests a stop (0: none) and, from the main process, the
    training time and whether the run has collapsed and is to end."""

    stop_signal: int = 0
    seconds: float = 0.0
    collapsed: bool = False

    @property
    def end(self) -> bool:
        """Whether the run is to end after this step."""
        return bool(self.stop_signal or self.collapsed)


_NO_FLAGS = Flags()


class _Report(NamedTuple):
    """What the host reads of a step: ``facts`` holds a finite flag for each of ``terms``, then the sum of flags."""

    iteration: int
    terms: list[str]
    facts: HostCopy


class StepGuard:
    """Agree over all processes, in each step, on whether its numbers are finite and whether a stop was requested.

    Args:
        max_in_a_row: number of consecutive skipped steps that ends the run; at least 40 for gradients while ``scaled``.
        scaled: whether a loss scaler is in use.
        last_good: returns the name of the newest checkpoint.

    Attributes:
        skipped: number of steps skipped so far, as far as the host has read.
    """

    def __init__(self, max_in_a_row: int, scaled: bool, last_good: Callable[[], str]) -> None:
        self.max_in_a_row, self.scaled, self.last_good = max_in_a_row, scaled, last_good
        self.in_a_row = self.skipped = 0
        self._own_flags = _NO_FLAGS
        self._reports: deque[_Report] = deque()

    @torch.no_grad()
    def check(
        self, iteration: int, losses: dict[str, Tensor], grad_norms: dict[str, Tensor], flags: Flags = _NO_FLAGS
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses averaged over all processes, and 0-dim 1.0 if the step must be skipped, else 0.0.

        Both are on the device and equal in all processes.

        Args:
            losses: this process's, 0-dim.
            grad_norms: 0-dim, of the averaged gradients, so the same everywhere.
            flags: this process's.
        """
        self._own_flags = flags
        values = torch.stack(list(losses.values())).float()
        shared = values.new_empty(0)
        if distributed.is_enabled():
            both = torch.cat((values, to_device(_encode(flags), values.device)))
            both = distributed.all_reduce(both)
            values, shared = both[: len(values)] / distributed.get_global_size(), both[len(values) :]
        norms = torch.stack([norm.float() for norm in grad_norms.values()])
        finite = torch.cat((values, norms)).isfinite()
        facts = torch.cat((finite.float(), shared))
        self._reports.append(_Report(iteration, [*losses, *grad_norms], to_host(facts)))
        return dict(zip(losses, values, strict=True)), 1.0 - finite.all().float()

    def poll(self) -> Flags:
        """Read the report of the step before the latest checked one; return the flags shared in it.

        Raises:
            NumericsError: too many consecutive steps were skipped; names the non-finite terms.
        """
        flags = _NO_FLAGS
        while len(self._reports) > 1:
            flags = self._read(self._reports.popleft())
        return flags if distributed.is_enabled() else self._own_flags  # a single process need not wait for a reduction

    def state(self) -> dict[str, int]:
        """Return what a checkpoint stores: the number of skipped steps, including those not yet read on the host."""
        waiting = sum(not all(report.facts.tolist()[: len(report.terms)]) for report in self._reports)
        return {"skipped_steps": self.skipped + waiting}

    def drain(self) -> None:
        """Read every report, waiting for the device. Raise as :meth:`poll` does."""
        while self._reports:
            self._read(self._reports.popleft())

    def _read(self, report: _Report) -> Flags:
        facts = report.facts.tolist()
        bad = [term for term, is_finite in zip(report.terms, facts, strict=False) if not is_finite]
        self._count(bad, report.iteration)
        return _decode(facts[len(report.terms) :])

    def _count(self, bad: list[str], iteration: int) -> None:
        if not bad:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.skipped += 1
        losses = [term for term in bad if not term.startswith("grad_norm_")]
        named = ", ".join(losses) or f"gradient of {', '.join(term.removeprefix('grad_norm_') for term in bad)}"
        logger.warning(f"non-finite {named} iteration={iteration}: step skipped, no weight has changed")
        limit = max(self.max_in_a_row, MAX_STEPS_SCALED) if self.scaled and not losses else self.max_in_a_row
        if self.in_a_row >= limit:
            raise NumericsError(
                f"loss: expected finite values, got non-finite {named} in {self.in_a_row} consecutive steps, the last "
                f"iteration={iteration}; lower optim.base_lr, lengthen optim.warmup_epochs, or set param_dtype to bf16 "
                f"or fp32; the same command resumes from the last good checkpoint, {self.last_good()}"
            )


def _encode(flags: Flags) -> Tensor:
    """Return a vector whose sum over all processes :func:`_decode` can read."""
    encoded = torch.zeros(2 + _NUM_SIGNALS)
    if distributed.is_main_process():
        encoded[0], encoded[1] = flags.seconds, float(flags.collapsed)
    if flags.stop_signal:
        encoded[2 + flags.stop_signal] = 1.0
    return encoded


def _decode(summed: list[float]) -> Flags:
    if not summed:
        return _NO_FLAGS
    asked = [signum for signum, count in enumerate(summed[2:]) if count]
    return Flags(asked[0] if asked else 0, summed[0], bool(summed[1]))
