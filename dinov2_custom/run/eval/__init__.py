"""Launchers of the evaluations."""
