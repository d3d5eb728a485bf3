"""Support ViT-S, ViT-Ti and all other widths, in every dtype.

Why: the index kernels of xformers up to 0.0.22 support only half precision and row lengths that are multiples of 256,
    so training ViT-S fails.
Target: dinov2/layers/block.py: index_select_cat, scaled_index_add
Kind: replaces two functions
Upstream: #160 #108 #278 #266 #319 #195
Drop-When: xformers >= 0.0.23 with Triton is installed everywhere
Test: tests/patches/test_faults.py::test_every_width
"""

from dinov2_custom.patching.packed import index_select_cat, scaled_index_add
