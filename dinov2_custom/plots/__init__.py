"""Plots of runs: metric curves, and patch features as colours.

Each name is imported on first use, so that plotting curves does not import torch. Start at ``history.py`` (all metrics
of runs), ``loss_curve.py`` or ``features.py``.
"""

import importlib

_MODULES = {
    "average_neighbours": "features",
    "dino_loss": "metrics_file",
    "draw_history": "history",
    "pca_colours": "features",
    "pca_colours_on_one_scale": "features",
    "plot_loss_curve": "loss_curve",
    "plot_rows": "features",
    "read_metrics": "metrics_file",
    "window_feature_map": "features",
}

__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
