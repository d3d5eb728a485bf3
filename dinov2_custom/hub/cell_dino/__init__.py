"""Upstream's place of the backbones for images of cells."""
