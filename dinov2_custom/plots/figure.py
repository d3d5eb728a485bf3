"""An empty figure. matplotlib is imported when one is made."""

from dinov2_custom.errors import optional


def new_figure(**kwargs):
    """Return an empty matplotlib figure that draws into files only.

    Raises:
        ConfigError: matplotlib is missing.
    """
    return optional("matplotlib.figure", "figures").Figure(dpi=120, **kwargs)
