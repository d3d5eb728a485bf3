"""Register tokens, by the facts of upstream's later revision: the oracle's does not have them yet."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dinov2_custom.models import vision_transformer as vits
from tests.oracle import preserved_rng, reduced_depth
from tests.parity.pair import unsettle


def _images() -> torch.Tensor:
    return torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models():
    """Return models without and with 4 registers, otherwise with the same weights."""
    kwargs = dict(img_size=112, patch_size=14, init_values=1.0, block_chunks=0)
    with preserved_rng(0), reduced_depth(vits, 2):
        plain, registers = vits.vit_small(**kwargs).eval(), vits.vit_small(num_register_tokens=4, **kwargs).eval()
    unsettle(plain, seed=1)
    missing = registers.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["register_tokens"]
    torch.nn.init.normal_(registers.register_tokens, generator=torch.Generator().manual_seed(2))
    return plain, registers


def test_registers_start_at_almost_nothing():
    model = vits.vit_small(num_register_tokens=4)
    assert model.register_tokens.shape == (1, 4, 384)
    assert 0 < float(model.register_tokens.detach().abs().max()) < 1e-5
    assert vits.vit_small().register_tokens is None


@torch.no_grad()
def test_registers_stand_after_the_class_token_and_have_no_position(models):
    plain, registers = models
    images = _images()
    expected, got = plain.prepare_tokens_with_masks(images), registers.prepare_tokens_with_masks(images)
    assert got.shape == (2, 1 + 4 + 64, 384)
    assert torch.equal(got[:, :1], expected[:, :1])
    assert torch.equal(got[:, 1:5], registers.register_tokens.expand(2, -1, -1))
    assert torch.equal(got[:, 5:], expected[:, 1:])


@torch.no_grad()
def test_registers_are_kept_apart_from_patch_tokens(models):
    plain, registers = models
    images = _images()
    features = registers(images, is_training=True)
    normed = registers.norm(features["x_prenorm"])
    assert torch.equal(features["x_norm_regtokens"], normed[:, 1:5])
    assert torch.equal(features["x_norm_patchtokens"], normed[:, 5:])
    patches, cls = registers.get_intermediate_layers(images, return_class_token=True)[0]
    assert_close(patches, normed[:, 5:])
    assert_close(cls, normed[:, 0])
    changed = features["x_norm_clstoken"] - plain(images)
    assert float(changed.abs().max()) > 1e-3
