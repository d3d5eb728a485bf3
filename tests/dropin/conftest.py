"""Upstream as a reference, and timm, for tests of code written for upstream."""

from tests.export.conftest import timm  # noqa: F401
from tests.parity.conftest import oracle  # noqa: F401
