"""Upstream's module name for :class:`MetricLogger` and :class:`SmoothedValue`."""

from dinov2_custom.logging.metrics import MetricLogger
from dinov2_custom.logging.smoothed_value import SmoothedValue

__all__ = ["MetricLogger", "SmoothedValue"]
