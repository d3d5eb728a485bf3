"""Upstream's module name for :class:`MetricLogger` and :class:`SmoothedValue`; they live in ``metrics.py``."""

from dinov2_custom.logging.metrics import MetricLogger, SmoothedValue

__all__ = ["MetricLogger", "SmoothedValue"]
