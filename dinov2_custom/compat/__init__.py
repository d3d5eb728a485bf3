"""What is here for upstream's names alone: nothing in this package uses it, ``dinov2.<name>`` answers with it."""
