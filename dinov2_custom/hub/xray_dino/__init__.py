"""Upstream's place of the backbone for X-ray images."""
