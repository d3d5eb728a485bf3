"""Respect train.output_dir in the configuration, and accept flags after the overrides.

Why: the working directory overwrites output_dir from the YAML file or the command line; --output-dir after a key=value
    is ignored.
Target: dinov2/utils/config.py: get_cfg_from_args
    dinov2/run/submit.py: submit_jobs
Elsewhere: dinov2/run/submit.py: submit_jobs
Kind: wraps two functions
Upstream: etienneguevel/dinov2 users, spec of the command line
Drop-When: --output-dir is always given before the overrides
Test: tests/patches/test_faults.py::test_output_dir
"""

# in dinov2/utils/config.py
from dinov2_custom.patching.config import with_output_dir

get_cfg_from_args = with_output_dir(get_cfg_from_args)

# in dinov2/run/submit.py
from dinov2_custom.patching.config import with_submit_dir

submit_jobs = with_submit_dir(submit_jobs)
