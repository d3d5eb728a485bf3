"""OFFICIAL_EPOCH_LENGTH: auto, and schedules that say what is wrong.

Why: an epoch is 1250 iterations whatever the data; a warm-up longer than the run ends in a bare AssertionError.
Target: dinov2/utils/config.py: apply_scaling_rules_to_cfg, distributed
    dinov2/utils/utils.py: CosineScheduler
Kind: wraps a function, replaces a class (same values)
Upstream: #135 #307 #376 #494
Drop-When: the epoch length is always given as a number that was thought about
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
