"""Train and infer without xformers, on any device.

Why: training asserts that xformers is installed, and inference on a CPU fails when it is. The patch uses
    torch's attention.
Target: dinov2/fsdp/__init__.py: FSDPCheckpointer
    dinov2/layers/attention.py: MemEffAttention, XFORMERS_AVAILABLE
    dinov2/layers/block.py: NestedTensorBlock, XFORMERS_AVAILABLE
    dinov2/train/ssl_meta_arch.py: SSLMetaArch
Kind: replaces the names imported from xformers
Upstream: #3 #13 #151 #180 #481
Drop-When: the checkout trains without xformers, or you want its kernels
Test: tests/patches/test_faults.py::test_no_xformers
"""

# in dinov2/fsdp/__init__.py
from dinov2_custom.patching import packed

packed.stand_in_for_xformers()

# in dinov2/layers/attention.py
from dinov2_custom.patching.packed import fmha, memory_efficient_attention, unbind

XFORMERS_AVAILABLE = True

# in dinov2/layers/block.py
from dinov2_custom.patching.packed import fmha, index_select_cat, scaled_index_add

XFORMERS_AVAILABLE = True

# in dinov2/train/ssl_meta_arch.py
from dinov2_custom.patching.packed import fmha, remove_stand_in

XFORMERS_AVAILABLE = True
remove_stand_in()
