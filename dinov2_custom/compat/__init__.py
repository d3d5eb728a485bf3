"""Modules that exist only for upstream's names: this package does not use them; ``dinov2.<name>`` resolves to them."""
