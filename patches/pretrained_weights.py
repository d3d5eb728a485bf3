"""Load student.pretrained_weights and evaluation weights with any wrapper, prefix, chunking and image size.

Why: released weights and teacher files raise KeyError: 'model'; with other block_chunks, nothing is loaded, silently.
Target: dinov2/train/ssl_meta_arch.py: SSLMetaArch.__init__
    dinov2/utils/utils.py: load_pretrained_weights
Elsewhere: dinov2/utils/utils.py: load_pretrained_weights
Kind: wraps a method, replaces a function
Upstream: #154 #204 #210 #218 #301 #316 #321 #339 #356 #432 #435 #473 #505 #512 #523
Drop-When: weights are always converted by hand
Test: tests/patches/test_faults.py::test_pretrained_weights
"""

# in dinov2/train/ssl_meta_arch.py
from dinov2_custom.patching.weights import with_flexible_weights

SSLMetaArch.__init__ = with_flexible_weights(SSLMetaArch.__init__)

# in dinov2/utils/utils.py
from dinov2_custom.utils.utils import load_pretrained_weights
