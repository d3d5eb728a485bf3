"""Compute KoLeo in float32.

Why: in half precision, the loss is infinite for a batch of one image and for duplicates, and then becomes NaN.
Target: dinov2/loss/koleo_loss.py: KoLeoLoss
Kind: replaces a class (same values in float32 for two or more images)
Upstream: #101 #143 #173 #307 #547
Drop-When: upstream merges #547
Test: tests/patches/test_faults.py::test_koleo
"""

from dinov2_custom.loss.koleo_loss import KoLeoLoss
