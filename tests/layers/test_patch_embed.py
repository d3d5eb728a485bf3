import pytest
import torch

from dinov2_custom.layers import PatchEmbed


def test_each_patch_is_one_linear_layer():
    embed = PatchEmbed(img_size=8, patch_size=4, embed_dim=5)
    x = torch.randn(2, 3, 8, 12)
    out = embed(x)
    patch = x[1, :, 4:8, 8:12]
    assert out.shape == (2, 6, 5)
    torch.testing.assert_close(out[1, 5], embed.proj.weight.flatten(1) @ patch.flatten() + embed.proj.bias)


def test_unflattened_keeps_the_grid():
    assert PatchEmbed(8, 4, embed_dim=5, flatten_embedding=False)(torch.zeros(1, 3, 8, 12)).shape == (1, 2, 3, 5)


def test_size_that_is_no_multiple_names_the_fix():
    with pytest.raises(ValueError, match="height: expected a multiple of the patch size 14, got 96; resize to 84"):
        PatchEmbed(224, 14, embed_dim=4)(torch.zeros(1, 3, 96, 98))
