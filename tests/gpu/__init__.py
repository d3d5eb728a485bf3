"""The first tests for a real card: run ``python -m pytest tests/gpu`` there; skipped elsewhere.

``tests/cuda_host`` runs them on the stand-in of the CUDA runtime, where the numbers are the CPU's: they stay in order.
"""

import pytest
import torch

from tests.cuda_host.counts import is_loaded

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ON_STAND_IN = is_loaded()
