"""Plot the loss curve of one run in a small figure; ``history.py`` plots all metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dinov2_custom.plots.figure import new_figure
from dinov2_custom.plots.metrics_file import dino_loss

_TERMS = {
    "dino_local_crops_loss": "DINO, local crops",
    "dino_global_crops_loss": "DINO, global crops",
    "ibot_loss": "iBOT (half)",
    "koleo_loss": "KoLeo (half)",
}


def plot_loss_curve(rows: Sequence[dict], path: str | Path, num_prototypes: int) -> Path:
    """Plot each loss term over the iterations, and the level ln(prototypes) of a collapsed run.

    The sum of the DINO terms, to which that level applies, is plotted as well.

    Args:
        rows: of :func:`dinov2_custom.plots.read_metrics`.
    """
    figure = new_figure(figsize=(8, 4.5))
    axes = figure.subplots()
    iterations = [row["iteration"] for row in rows]
    for key, label in _TERMS.items():
        if key in rows[0]:
            axes.plot(iterations, [row[key] for row in rows], label=label, linewidth=1)
    if "dino_global_crops_loss" in rows[0]:
        axes.plot(iterations, [dino_loss(row) for row in rows], label="DINO, local + global", color="black")
        level = math.log(num_prototypes)
        axes.axhline(level, color="grey", linestyle=":", label=f"ln(prototypes) = {level:.2f}: nothing learned")
    axes.set(xlabel="iteration", ylabel="loss", title="Training loss")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    return Path(path)
