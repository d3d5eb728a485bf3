"""Replace an unreadable image by the next one.

Why: one broken file ends the training of all ranks. Evaluations, which need every label, still stop.
Target: dinov2/data/loaders.py: make_dataset
Kind: wraps a function
Upstream: csaroff/dinov2 README, #98
Drop-When: all data has been verified (python run/data/verify.py)
Test: tests/patches/test_faults.py::test_skip_bad_images
"""

from dinov2_custom.patching.datasets import with_skipping

make_dataset = with_skipping(make_dataset)
