"""Upstream's package of the backbone for X-ray images."""
