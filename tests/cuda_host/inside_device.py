"""The device and its random state on the stand-in.

Run by ``test_cuda_host.py``.
"""

import pytest
import torch

from dinov2_custom.api import _random_state
from dinov2_custom.teacher import device_of_choice
from dinov2_custom.utils.utils import fix_random_seeds


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_float32_is_full_precision_however_the_device_is_named(name):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert device_of_choice(name) == torch.device("cuda", 0)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_a_function_leaves_the_random_state_of_the_device():
    torch.zeros((), device="cuda")
    before = torch.cuda.get_rng_state()
    with _random_state():
        fix_random_seeds(7)
        assert not torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(torch.cuda.get_rng_state(), before)
