"""Support FSDP of torch 2.1 and later.

Why: the code reads FSDP attributes that torch 2.1 renamed (_handles) or removed (_streams).
Target: dinov2/fsdp/__init__.py: free_if_fsdp, is_sharded_fsdp, _reshard
    dinov2/train/ssl_meta_arch.py: SSLMetaArch.fsdp_synchronize_streams
Kind: replaces a function and a method
Upstream: #265 #310 #391
Drop-When: the checkout trains on two GPUs with the installed torch
Test: tests/patches/test_faults.py::test_fsdp_attributes
"""

# in dinov2/fsdp/__init__.py
from dinov2_custom.patching.fsdp import free_if_sharded


def free_if_fsdp(x):
    free_if_sharded(x, is_sharded_fsdp, _reshard)


# in dinov2/train/ssl_meta_arch.py
from dinov2_custom.patching.fsdp import synchronize_streams

SSLMetaArch.fsdp_synchronize_streams = synchronize_streams
