import copy
import types
from functools import partial

import pytest
import torch
from torch import nn

from dinov2_custom.layers import Attention, Block, DINOHead, MemEffAttention, NestedTensorBlock, SwiGLUFFNFused
from dinov2_custom.layers.block import BlockChunk
from dinov2_custom.layers.unmodified import find_change, find_change_of_all, unmodified_blocks

OPTIONS = [
    {},
    {"ffn_layer": SwiGLUFFNFused, "attn_class": MemEffAttention},
    {"act_layer": partial(nn.GELU, approximate="tanh"), "drop_path": 0.3, "init_values": 0.5},
]


@pytest.mark.parametrize("cls", [Block, NestedTensorBlock])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_built(cls, options):
    block = cls(32, 2, **options)
    assert find_change(block) is None and find_change_of_all() is None
    assert find_change(copy.deepcopy(block).half().requires_grad_(False)) is None
    assert find_change(DINOHead(8, 16), (DINOHead,)) is None


@pytest.mark.parametrize("name", [name for name, _ in Block(32, 2).named_modules()])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
     "register_full_backward_pre_hook"],
)  # fmt: skip
def test_a_hook_anywhere_is_found(name, register):
    block = Block(32, 2)
    handle = getattr(block.get_submodule(name), register)(lambda *_: None)
    assert name in find_change(block, name="block")
    handle.remove()
    assert find_change(block) is None


@pytest.mark.parametrize("name", [name for name, _ in Block(32, 2, init_values=1.0).named_modules()])
def test_another_class_or_forward_anywhere_is_found(name):
    def swapped(module):
        module.__class__ = type("Other", (type(module),), {})

    def patched(module):
        module.forward = types.MethodType(type(module).forward, module)

    def compiled(module):
        module._compiled_call_impl = module._call_impl  # what module.compile() sets

    for change in (swapped, patched, compiled):
        block = Block(32, 2, init_values=1.0)
        change(block.get_submodule(name))
        assert name in find_change(block, name="block")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"drop": 0.1}, ".proj_drop"),
        ({"attn_drop": 0.1}, ".attn_drop"),
        ({"norm_layer": nn.Identity}, ".norm1"),
        ({"norm_layer": partial(nn.LayerNorm, bias=False)}, ".norm1"),
        ({"act_layer": nn.Tanh}, ".mlp.act"),
        ({"ffn_layer": lambda **_: nn.Identity()}, ".mlp"),
    ],
)
def test_what_the_weights_do_not_say(options, part):
    assert part in find_change(Block(32, 2, **options))


def test_known_modules_in_another_place():
    block = Block(32, 2)
    block.attn, block.mlp = block.mlp, block.attn
    assert ".attn" in find_change(block)
    block = Block(32, 2)
    del block.norm2
    assert ".norm2" in find_change(block)


def test_parametrizations_are_found():
    block = Block(32, 2)
    nn.utils.parametrizations.weight_norm(block.mlp.fc1)
    assert ".mlp.fc1" in find_change(block)


def test_patched_classes_and_hooks_on_all_modules(monkeypatch):
    for cls in (Attention, Block, nn.Linear, nn.LayerNorm):
        monkeypatch.setattr(cls, "forward", lambda self, x: x)
        assert cls.__name__ in find_change_of_all()
        monkeypatch.undo()
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    assert "all modules" in find_change_of_all()
    handle.remove()
    assert find_change_of_all() is None


def test_blocks_and_chunks():
    chunks = nn.ModuleList([BlockChunk([Block(32, 2), Block(32, 2)]), BlockChunk([nn.Identity(), Block(32, 2)])])
    assert unmodified_blocks(chunks, "blocks") == ({*chunks[0], chunks[1][1]}, [])
    chunks[0][1].attn.proj = nn.Sequential(chunks[0][1].attn.proj)
    chunks[1].register_forward_hook(lambda *_: None)
    found, changes = unmodified_blocks(chunks, "blocks")
    assert found == {chunks[0][0]}
    assert "blocks.0.1.attn.proj" in changes[0] and changes[1].endswith("on blocks.1")


def test_a_patched_class_is_called_by_its_subclass(monkeypatch):
    monkeypatch.setattr(Attention, "forward", lambda self, x: x)
    x = torch.randn(1, 3, 32)
    assert MemEffAttention(32, 2)(x) is x
