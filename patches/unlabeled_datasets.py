"""Add dataset names for unlabeled images.

Why: make_dataset supports only ImageNet and ImageNet22k; there is no way to train on a folder of images.
Target: dinov2/data/loaders.py: make_dataset
Kind: wraps a function; the checkout's own names keep working
Upstream: #34 #98 #107 #112 #126 #142 #145 #233 #243 #382 #392 #432 #460 #567
Drop-When: the checkout supports such a dataset
Test: tests/patches/test_faults.py::test_unlabeled_datasets
"""

from dinov2_custom.patching.datasets import with_unlabeled

make_dataset = with_unlabeled(make_dataset)
