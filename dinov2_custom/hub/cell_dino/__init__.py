"""Upstream's package of the backbones for cell images."""
