"""Launcher of the training of decoders."""
