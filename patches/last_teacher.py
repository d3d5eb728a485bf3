"""Write a teacher checkpoint at the end of short runs.

Why: a run shorter than evaluation.eval_period_iterations writes no teacher_checkpoint.pth.
Target: dinov2/utils/config.py: apply_scaling_rules_to_cfg
Kind: wraps a function
Upstream: #234 #235 #487
Drop-When: eval_period_iterations divides the length of every run
Test: tests/patches/test_faults.py::test_last_teacher
"""

from dinov2_custom.patching.config import with_last_teacher

apply_scaling_rules_to_cfg = with_last_teacher(apply_scaling_rules_to_cfg)
