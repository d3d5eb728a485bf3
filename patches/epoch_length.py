"""Support OFFICIAL_EPOCH_LENGTH: auto, and report invalid schedules.

Why: an epoch is 1250 iterations for any dataset; a warm-up longer than the run raises a bare AssertionError.
Target: dinov2/utils/config.py: apply_scaling_rules_to_cfg, distributed
    dinov2/utils/utils.py: CosineScheduler
Kind: wraps a function, replaces a class (same values)
Upstream: #135 #307 #376 #494
Drop-When: the epoch length is always set explicitly
Test: tests/patches/test_faults.py::test_epoch_length
"""

# in dinov2/utils/config.py
from dinov2_custom.patching.config import with_epoch_length


def _number_of_images(dataset_str):
    from dinov2.data import make_dataset

    return len(make_dataset(dataset_str=dataset_str))


apply_scaling_rules_to_cfg = with_epoch_length(
    apply_scaling_rules_to_cfg, _number_of_images, distributed.get_global_size
)

# in dinov2/utils/utils.py
from dinov2_custom.utils.schedules import CosineScheduler
