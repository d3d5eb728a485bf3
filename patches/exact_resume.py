"""A resumed run continues with the images that the uninterrupted run would have used.

Why: the training loop seeds the order of images with its first iteration and skips nothing, so a resumed run starts
    another order from the beginning and repeats the crops of the run's first batches.
Target: dinov2/data/loaders.py: make_data_loader, ShardedInfiniteSampler
Requires: dinov2/train/train.py: seed=start_iter
Kind: wraps a function, replaces a class
Upstream: #226 #341 #358
Drop-When: the loop passes train.seed and sampler_advance itself (then this patch is refused)
Test: tests/patches/test_faults.py::test_exact_resume
"""

from dinov2_custom.data.samplers import ShardedInfiniteSampler
from dinov2_custom.patching.datasets import with_exact_resume

make_data_loader = with_exact_resume(make_data_loader)
