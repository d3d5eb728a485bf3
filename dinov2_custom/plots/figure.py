"""Create figures; matplotlib is imported on the first call."""

from dinov2_custom.errors import optional


def new_figure(**kwargs):
    """Return an empty matplotlib figure that only renders to files.

    Raises:
        ConfigError: if matplotlib is missing.
    """
    return optional("matplotlib.figure", "figures").Figure(dpi=120, **kwargs)
