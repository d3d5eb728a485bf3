import pytest
import torch

from dinov2_custom.models import vision_transformer as vits
from dinov2_custom.models.pos_embed import resample_pos_embed
from dinov2_custom.models.stacking import drop_path_rates


def make(**kwargs):
    torch.manual_seed(0)
    defaults = {"patch_size": 4, "img_size": 16, "init_values": 1e-2, "block_chunks": 0}
    return vits.vit_nano(**(defaults | kwargs))


def images(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, side, side, generator=g) for batch, side in shapes]


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu", "swiglufused", "identity"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_gives_finite_gradients(ffn_layer, registers, dtype):
    model = make(ffn_layer=ffn_layer, num_register_tokens=registers, drop_path_rate=0.3, drop_path_uniform=True).train()
    crops = images((3, 16), (4, 8))
    masks = [torch.rand(3, 16) > 0.5, None]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        features = model(crops, masks=masks, is_training=True, draws=model.draw([3, 4], torch.Generator()))
        loss = sum((one["x_norm_clstoken"].float() ** 2).mean() for one in features)
        loss = loss + (features[0]["x_norm_patchtokens"].float() ** 2).mean()
    loss.backward()
    assert features[0]["x_norm_regtokens"].shape == (3, registers, 64)
    assert features[1]["x_norm_patchtokens"].shape == (4, 4, 64)
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []


@pytest.mark.parametrize("arch", vits.ARCHITECTURES)
def test_widths_and_heads(arch):
    with torch.device("meta"):
        model = getattr(vits, arch)(patch_size=14, img_size=28)
    assert model.embed_dim // model.num_heads == 64
    assert len(model.all_blocks()) == model.n_blocks


def test_list_equals_each_alone():
    model = make().eval()
    crops = images((2, 16), (3, 8))
    for together, crop in zip(model(crops, is_training=True), crops, strict=True):
        torch.testing.assert_close(together["x_norm_patchtokens"], model(crop, is_training=True)["x_norm_patchtokens"])


def test_masked_patches_do_not_see_their_pixels():
    model = make().eval()
    (x,) = images((1, 16))
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 5] = True  # row 1, column 1: pixels 4..8
    changed = x.clone()
    changed[..., 4:8, 4:8] += 1
    assert torch.equal(model.prepare_tokens_with_masks(x, masks), model.prepare_tokens_with_masks(changed, masks))
    assert not torch.equal(model.prepare_tokens_with_masks(x), model.prepare_tokens_with_masks(changed))


def test_registers_carry_no_position():
    model = make(num_register_tokens=2)
    (x,) = images((1, 16))
    tokens = model.prepare_tokens_with_masks(x)
    torch.testing.assert_close(tokens[:, 1:3], model.register_tokens)


def test_intermediate_layers_in_order_of_depth():
    model = make(num_register_tokens=2, block_chunks=2).eval()
    (x,) = images((2, 16))
    (last,) = model.get_intermediate_layers(x)
    torch.testing.assert_close(last, model(x, is_training=True)["x_norm_patchtokens"])
    first, second = model.get_intermediate_layers(x, n=[3, 1], reshape=True, return_class_token=True)
    assert first[0].shape == (2, 64, 4, 4) and first[1].shape == (2, 64)
    torch.testing.assert_close(second[0].flatten(2).transpose(1, 2), last)
    with pytest.raises(ValueError, match="block indices within 0..3"):
        model.get_intermediate_layers(x, n=[9])


@pytest.mark.parametrize("shape", [(2, 5, 16, 16), (3, 1, 8, 24)], ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("return_class_token", [False, True])
@torch.no_grad()
def test_a_bag_of_channels_is_each_channel_alone(shape, norm, return_class_token):
    plain = make(in_chans=1, num_register_tokens=2, block_chunks=2).eval()
    bag = make(in_chans=1, num_register_tokens=2, block_chunks=2, channel_adaptive=True).eval()
    bag.load_state_dict(plain.state_dict())
    assert (plain.bag_of_channels, bag.bag_of_channels) == (False, True)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    b, c, h, w = shape
    options = {"n": [1, 3], "norm": norm, "return_class_token": return_class_token}
    grids = bag.get_intermediate_layers(x, reshape=True, **options)
    for layer, (patches, class_tokens) in enumerate(bag.get_intermediate_layers(x, **options)):
        assert patches.shape == (b, c, h * w // 16, 64) and class_tokens.shape == (b, c * 64)
        assert grids[layer][0].shape == (b, c, 64, h // 4, w // 4)
        torch.testing.assert_close(grids[layer][0].flatten(3).transpose(2, 3), patches)
        for channel in range(c):
            one = x[:, channel : channel + 1]
            alone = plain.get_intermediate_layers(one, n=[1, 3], norm=norm, return_class_token=True)[layer]
            torch.testing.assert_close(patches[:, channel], alone[0])
            torch.testing.assert_close(class_tokens[:, channel * 64 : channel * 64 + 64], alone[1])


def test_channels_by_place_as_upstream_has_them():
    model = vits.vit_nano(4, 2, 5, True, img_size=16)
    assert (model.patch_size, model.num_register_tokens, model.bag_of_channels) == (4, 2, True)
    assert model.patch_embed.proj.weight.shape == (64, 5, 4, 4)
    assert vits.vit_nano(4, img_size=16).patch_embed.proj.in_channels == 3


def test_non_square_images():
    x = torch.randn(2, 3, 16, 24)
    assert make().eval()(x, is_training=True)["x_norm_patchtokens"].shape == (2, 24, 64)


def test_position_is_returned_untouched_at_native_size():
    model = make()
    tokens = torch.zeros(1, 17, 64)
    assert model.interpolate_pos_encoding(tokens, 16, 16) is model.pos_embed


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_resampling_gives_every_grid(antialias, offset):
    pos = torch.randn(1, 1 + 37 * 37, 2)
    for side in (1, 2, 7, 16, 37, 64, 129):
        resampled = resample_pos_embed(pos, (side, side), antialias=antialias, offset=offset)
        assert resampled.shape == (1, 1 + side * side, 2)


def test_offset_and_exact_size_differ_as_released_models_need():
    pos = torch.randn(1, 1 + 16 * 16, 4, generator=torch.Generator().manual_seed(0))
    exact, shifted = resample_pos_embed(pos, (7, 7)), resample_pos_embed(pos, (7, 7), offset=0.1)
    assert 1e-4 < (exact - shifted).abs().mean() < 0.2


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="ffn_layer: expected one of"):
        make(ffn_layer="glu")
    with pytest.raises(ValueError, match="at most the depth 4, got 5"):
        make(block_chunks=5)


def test_drop_path_rates():
    assert drop_path_rates(3, 0.3, True) == [0.3, 0.3, 0.3]
    assert drop_path_rates(3, 0.3, False) == pytest.approx([0, 0.15, 0.3])


def test_features_of_constructor_default_are_chunked_and_config_default_flat():
    assert "blocks.0.3.norm1.weight" in vits.vit_nano(img_size=16, patch_size=4).state_dict()
    assert "blocks.3.norm1.weight" in make().state_dict()
