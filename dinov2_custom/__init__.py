"""DINOv2 pretraining on your own unlabeled images. Start reading at ``dinov2_custom.train.train.do_train``."""

__version__ = "0.1.0"
