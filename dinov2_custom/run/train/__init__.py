"""The launcher's side of training."""
