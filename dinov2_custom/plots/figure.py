"""An empty figure. matplotlib is imported when one is made."""

from dinov2_custom.errors import ConfigError


def new_figure(**kwargs):
    """Return an empty matplotlib figure that draws into files only.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError("figures: expected matplotlib, got no such package; run: pip install matplotlib") from e
    return Figure(dpi=120, **kwargs)
