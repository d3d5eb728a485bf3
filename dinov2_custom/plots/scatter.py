"""Plot features as points in the plane of their first two principal components, coloured by class."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinov2_custom.plots.features import principal_components
from dinov2_custom.plots.figure import new_figure

MAX_LEGEND, MAX_FOLDERS = 20, 100


def folder_labels(paths: Sequence[str]) -> list[str] | None:
    """Return each path's folder below the common folder, or None if these folders are no classes."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    firsts = [os.path.relpath(path, common).split(os.sep) for path in paths]
    names = {parts[0] for parts in firsts}
    if any(len(parts) < 2 for parts in firsts) or not 2 <= len(names) <= MAX_FOLDERS:
        return None
    return [parts[0] for parts in firsts]


def plot_scatter(features: np.ndarray, labels: Sequence[str] | None, path: str | Path, title: str) -> Path:
    """Save a scatter plot of ``features`` (N, D) with one colour per class and, for up to 20 classes, a legend."""
    (points,), shares = principal_components([features], 2)
    figure = new_figure(figsize=(8, 6))
    axis = figure.subplots()
    names = sorted(set(labels or [""]))
    for number, name in enumerate(names):
        chosen = np.array([label == name for label in labels]) if labels else slice(None)
        # evenly spaced hues; a single class is dark grey
        colour = colorsys.hls_to_rgb(number / len(names), 0.45, 0.75) if len(names) > 1 else "0.25"
        axis.scatter(*points[chosen].T, s=14, alpha=0.7, linewidths=0, color=colour, label=name)
    axis.set(
        xlabel=f"first component ({shares[0]:.0%} of the variance)", ylabel=f"second ({shares[1]:.0%})", title=title
    )
    if 1 < len(names) <= MAX_LEGEND:
        axis.legend(fontsize=8, markerscale=1.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path)
    return Path(path)
