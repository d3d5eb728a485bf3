"""Collate samples without a target.

Why: the collate function indexes (sample, target) pairs; a dataset that returns only crops raises
    KeyError: 0.
Target: dinov2/data/collate.py: collate_data_and_cast
Kind: replaces a function; masks are drawn by the checkout's own generator, with the same draws
Upstream: #100 #142
Drop-When: all datasets return pairs
Test: tests/patches/test_faults.py::test_class_free_collate
"""

from dinov2_custom.patching.datasets import collate_data_and_cast
