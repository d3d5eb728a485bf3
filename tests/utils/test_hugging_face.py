"""Hugging Face's Dinov2 models, created by that library, give the same features here."""

import json

import pytest
import torch

from dinov2_custom.errors import CheckpointError
from dinov2_custom.models.vision_transformer import vit_nano
from dinov2_custom.teacher import load_pretrained_backbone
from dinov2_custom.utils.hugging_face import from_hugging_face, is_hugging_face
from dinov2_custom.utils.weights import flat_state, read_weights

transformers = pytest.importorskip(
    "transformers", reason='NO TEST AGAINST HUGGING FACE: run pip install -c constraints.txt -e ".[export]"'
)


def theirs(swiglu=False, registers=0, head=False, side=16):
    """Return a transformers model with the shape of vit_nano and random weights in every tensor."""
    ours = ours_like(swiglu, registers)
    config = dict(
        hidden_size=ours.embed_dim,
        num_hidden_layers=ours.n_blocks,
        num_attention_heads=ours.num_heads,
        mlp_ratio=4,
        image_size=side,
        patch_size=4,
        use_swiglu_ffn=swiglu,
        layer_norm_eps=1e-6,
    )
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **config)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        kind = transformers.Dinov2ForImageClassification if head else transformers.Dinov2Model
        model = kind(transformers.Dinov2Config(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def ours_like(swiglu, registers, chunks=0, side=16):
    return vit_nano(
        patch_size=4,
        img_size=side,
        init_values=1.0,
        block_chunks=chunks,
        ffn_layer="swiglufused" if swiglu else "mlp",
        num_register_tokens=registers,
    ).eval()


@pytest.mark.parametrize(
    ("swiglu", "registers", "head", "chunks"),
    [(False, 0, False, 0), (True, 0, False, 2), (False, 4, False, 0), (False, 0, True, 4)],
)
def test_features_equal_theirs(tmp_path, swiglu, registers, head, chunks):
    model, target = theirs(swiglu, registers, head), ours_like(swiglu, registers, chunks)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    load_pretrained_backbone(target, tmp_path if swiglu else tmp_path / "model.safetensors")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    backbone = model.dinov2 if head else model
    with torch.no_grad():
        expected = backbone(pixels).last_hidden_state
        got = target(pixels, is_training=True)
    tokens = torch.cat((got["x_norm_clstoken"][:, None], got["x_norm_regtokens"], got["x_norm_patchtokens"]), dim=1)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_a_model_in_several_files(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    state = flat_state(read_weights(tmp_path))
    assert torch.equal(state["cls_token"], model.embeddings.cls_token)


@pytest.mark.parametrize("swiglu", [False, True])
def test_names_in_the_librarys_memory_are_those_of_its_files(tmp_path, swiglu):
    model = theirs(swiglu)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    pickled, saved = (flat_state(read_weights(tmp_path / name)) for name in ("pytorch_model.bin", "model.safetensors"))
    assert pickled.keys() == saved.keys() and all(torch.equal(value, saved[name]) for name, value in pickled.items())


def test_positions_of_another_image_size_are_resampled(tmp_path):
    model, target = theirs(side=32), ours_like(False, 0, side=16)
    model.save_pretrained(tmp_path)
    load_pretrained_backbone(target, tmp_path)
    assert target.pos_embed.shape == (1, 17, 64)
    torch.testing.assert_close(target.pos_embed[:, 0], model.embeddings.position_embeddings[:, 0])


def test_another_feed_forward_network_is_refused(tmp_path):
    theirs(swiglu=True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"mlp\.fc1\.weight: missing"):
        load_pretrained_backbone(ours_like(False, 0), tmp_path)


def test_our_names_are_not_theirs():
    assert not is_hugging_face(ours_like(False, 0).state_dict())


@pytest.mark.parametrize("part", ["attention.attention.key", "attention.k_proj"])
def test_a_part_of_attention_that_is_missing_is_named(part):
    whole = ("attention.attention.query", part) if "attention.attention" in part else ("attention.q_proj", part)
    state = {"embeddings.cls_token": torch.zeros(1, 1, 4), f"encoder.layer.1.{whole[0]}.weight": torch.zeros(4, 4)}
    with pytest.raises(CheckpointError, match=rf"blocks\.1\.attn\.qkv\.weight: .* got no {part}"):
        from_hugging_face(state)
