"""Multipliers of every parameter: upstream's figures, wrapped and chunked names, and upstream's own functions."""

import pytest
import torch
from torch import nn

from dinov2_custom.utils.param_groups import fuse_params_groups, get_params_groups_with_decay, get_vit_lr_decay_rate
from tests.utils.oracle_file import load_oracle_file


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(2)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(2, 6)})
        self.ls1 = nn.Module()
        self.ls1.gamma = nn.Parameter(torch.ones(2))


class Backbone(nn.Module):
    """A module with the parameter names of a ViT, without its computation."""

    def __init__(self, depth=12, chunks=0):
        super().__init__()
        for name in ("cls_token", "pos_embed", "register_tokens", "mask_token"):
            setattr(self, name, nn.Parameter(torch.zeros(1, 2)))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 2, 1)})
        self.n_blocks, self.chunked_blocks = depth, chunks > 0
        blocks, size = [Block() for _ in range(depth)], depth // chunks if chunks else depth
        if chunks:  # the index inside a chunk is global
            starts = range(0, depth, size)
            blocks = [nn.ModuleList([nn.Identity()] * start + blocks[start : start + size]) for start in starts]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(2)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
        self.last_layer = nn.Module()
        self.last_layer.weight_g = nn.Parameter(torch.ones(4, 1))
        self.last_layer.weight_v = nn.Parameter(torch.ones(4, 2))


class Wrapped(nn.Module):
    """A wrapper that, like DDP, does not forward attributes."""

    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)


def _by_name(model, **kwargs):
    return {group.pop("name"): group for group in get_params_groups_with_decay(model, **kwargs)}


def test_figures_of_upstream_for_vit_small():
    groups = _by_name(Backbone(), lr_decay_rate=0.9, patch_embed_lr_mult=0.2)
    expected = {
        "pos_embed": 0.25419,
        "cls_token": 0.25419,
        "mask_token": 0.25419,
        "register_tokens": 0.25419,
        "patch_embed.proj.weight": 0.05084,
        "patch_embed.proj.bias": 0.05084,
        "blocks.0.attn.qkv.weight": 0.28243,
        "blocks.11.attn.qkv.bias": 0.9,
        "norm.weight": 1.0,
    }
    assert {name: groups[name]["lr_multiplier"] for name in expected} == pytest.approx(expected, abs=5e-6)


def test_weight_decay_is_off_for_biases_norms_and_gammas_only():
    model = nn.ModuleDict({"backbone": Backbone(2), "head": Head()})
    groups = _by_name(model["backbone"]) | _by_name(model["head"])
    undecayed = {name for name, group in groups.items() if group["wd_multiplier"] == 0.0}
    assert undecayed == {name for name in groups if name.endswith("bias") or "norm" in name or "gamma" in name}
    assert {"cls_token", "pos_embed", "mask_token", "register_tokens", "last_layer.weight_g"}.isdisjoint(undecayed)
    assert set(groups) - undecayed == {name for name in groups if groups[name]["wd_multiplier"] == 1.0}


def test_head_is_not_scaled_and_its_last_layer_is_marked():
    groups = _by_name(Head(), lr_decay_rate=0.5, patch_embed_lr_mult=0.2)
    assert {group["lr_multiplier"] for group in groups.values()} == {1.0}
    assert {name for name in groups if groups[name]["is_last_layer"]} == {"last_layer.weight_g", "last_layer.weight_v"}


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_chunked_blocks_get_the_same_as_plain_ones(chunks):
    plain, chunked = _by_name(Backbone(8), lr_decay_rate=0.8), _by_name(Backbone(8, chunks), lr_decay_rate=0.8)
    multipliers = [[group["lr_multiplier"] for group in groups.values()] for groups in (plain, chunked)]
    assert multipliers[0] == multipliers[1]
    assert f"blocks.{chunks - 1}.7.norm1.weight" in chunked


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module"])
def test_wrapped_models_keep_their_names(wrapper):
    model = Backbone(3)
    expected = _by_name(model, lr_decay_rate=0.9)
    model.blocks[1] = Wrapped("_checkpoint_wrapped_module", model.blocks[1])
    assert _by_name(Wrapped("module", Wrapped(wrapper, model)), lr_decay_rate=0.9) == expected


def test_a_name_that_merely_contains_a_wrappers_name_stays():
    assert list(_by_name(Wrapped("my_module", nn.Linear(1, 1)))) == ["my_module.weight", "my_module.bias"]


def test_frozen_parameters_are_left_out():
    head = Head()
    head.last_layer.weight_g.requires_grad = False
    assert "last_layer.weight_g" not in _by_name(head)


def test_fused_groups():
    groups = fuse_params_groups(get_params_groups_with_decay(Backbone(3), 0.9, 0.2))
    triples = [(group["lr_multiplier"], group["wd_multiplier"], group["is_last_layer"]) for group in groups]
    assert len(set(triples)) == len(triples) == 2 + 1 + 2 * 3 + 1  # patch embed, tokens, blocks, norm
    assert sum(len(group["params"]) for group in groups) == len(list(Backbone(3).parameters()))
    assert all(set(group) == {"params", "lr_multiplier", "wd_multiplier", "is_last_layer"} for group in groups)
    torch.optim.AdamW(groups)


def test_fused_by_other_keys():
    groups = fuse_params_groups(get_params_groups_with_decay(Backbone(2), 0.9), keys=("wd_multiplier",))
    assert [set(group) for group in groups] == [{"params", "wd_multiplier"}] * 2


@pytest.mark.parametrize("chunks", [0, 2])
@pytest.mark.parametrize("rate", [1.0, 0.9, 0.65])
def test_groups_equal_upstreams(chunks, rate):
    upstream, model = load_oracle_file("utils/param_groups.py"), Backbone(4, chunks)
    del model.register_tokens  # not in upstream's revision of the oracle
    for part in (model, Head()):
        ours, theirs = (m.get_params_groups_with_decay(part, rate, 0.2) for m in (_ours(), upstream))
        assert ours == theirs
        fused, expected = fuse_params_groups(ours), list(upstream.fuse_params_groups(theirs))
        assert [_identities(group) for group in fused] == [_identities(group) for group in expected]


@pytest.mark.parametrize(
    "name",
    ["backbone.pos_embed", "backbone.patch_embed.proj.bias", "backbone.blocks.3.mlp.fc1.weight", "backbone.norm.bias"],
)
def test_rate_of_a_name_equals_upstreams(name):
    theirs = load_oracle_file("utils/param_groups.py").get_vit_lr_decay_rate
    assert get_vit_lr_decay_rate(name, 0.9, 12) == theirs(name, 0.9, 12)
    assert get_vit_lr_decay_rate("dino_head.mlp.0.weight", 0.9, 12) == 1.0


def _ours():
    from dinov2_custom.utils import param_groups

    return param_groups


def _identities(group):
    return {key: [id(p) for p in value] if key == "params" else value for key, value in group.items()}
