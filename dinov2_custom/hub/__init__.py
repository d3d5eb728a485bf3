"""Entry points of ``hubconf.py`` for ``torch.hub.load``. Read ``backbones.py`` first."""
