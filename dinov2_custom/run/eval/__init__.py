"""The launcher's side of the evaluations."""
