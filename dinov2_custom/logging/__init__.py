"""Log lines, metrics and progress of a run.

Read :func:`dinov2_custom.logging.setup.setup_logging` and :meth:`dinov2_custom.logging.metrics.MetricLogger.log_every`
first. ``sinks`` writes the metrics, ``smoothed_value`` computes the statistics of one series.
"""

from dinov2_custom.logging.metrics import MetricLogger
from dinov2_custom.logging.progress import ProgressBar, track
from dinov2_custom.logging.setup import open_log, remove_logging, setup_logging
from dinov2_custom.logging.sinks import METRICS_FILE, Sinks, open_sinks, read_rows, truncate_after
from dinov2_custom.logging.smoothed_value import WINDOW, SmoothedValue
