"""Datasets: unlabeled folders, labelled folders for evaluation, and upstream's ImageNet layouts."""

from .extended import ExtendedVisionDataset
from .folder import ImageDataset, LabelledFolder
from .image_net import ImageNet
from .image_net_22k import ImageNet22k

__all__ = ["ExtendedVisionDataset", "ImageDataset", "ImageNet", "ImageNet22k", "LabelledFolder"]
