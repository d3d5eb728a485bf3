"""The errors a user can meet. Everything else that is raised is a bug of this package.

Every message says what was expected, what was found, where (file, key or path) and what to do about it.
"""


class DINOv2Error(Exception):
    """Base of all errors that the user, not the developer, can mend."""


class ConfigError(DINOv2Error):
    """A configuration key, type, value or combination that cannot work."""


class DataError(DINOv2Error):
    """A dataset that is missing, empty or too broken to train on."""


class CheckpointError(DINOv2Error):
    """A checkpoint or weight file that is missing, torn or of another architecture."""


class LaunchError(DINOv2Error):
    """A job that cannot be started as asked."""


class NumericsError(DINOv2Error):
    """A loss or gradient that stayed non-finite, or a collapsed run."""
