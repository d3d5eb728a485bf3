"""Unlabeled images from any source, labelled folders for evaluation, and upstream's ImageNet layouts."""

from .extended import ExtendedVisionDataset
from .folder import ImageDataset, LabelledFolder
from .image_net import ImageNet
from .image_net_22k import ImageNet22k
from .source_dataset import SourceDataset
