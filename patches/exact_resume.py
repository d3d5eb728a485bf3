"""A resumed run goes on with the images that would have come.

Why: the training loop seeds the order of images with the iteration it starts at and skips nothing, so that a resumed
    run sees another order from its beginning, and draws the crops of the run's first batches again.
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
