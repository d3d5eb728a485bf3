"""What ``hubconf.py`` offers to ``torch.hub.load``. Read ``backbones.py`` first."""
