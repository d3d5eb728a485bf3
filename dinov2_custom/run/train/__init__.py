"""Launcher of the training."""
