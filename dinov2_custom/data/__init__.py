"""Datasets, augmentation, masks and loaders, under upstream's names.

Read ``loaders.make_train_loader`` first. It combines a dataset (``sources``, ``decode``), the order of the images
(``samplers``), the crops (``draws``, ``pixels``, ``augmentations``), the masks (``masking``) and the worker processes
(``samples``, ``pool``).
"""

from .adapters import DatasetWithEnumeratedTargets
from .augmentations import DataAugmentationDINO
from .collate import collate_data_and_cast
from .loaders import SamplerType, make_data_loader, make_dataset
from .masking import MaskingGenerator
