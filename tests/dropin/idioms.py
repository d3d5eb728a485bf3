"""Common modifications of DINOv2's modules, written once for upstream's model and ours.

Each idiom is a function of (backbone, monkeypatch) that returns a list; observations of hooks and patches are added to
it. Classes are found through the modules, so that no package is named here. Read :data:`IDIOMS` first.
"""

from __future__ import annotations

import types

import torch
from torch import nn


def blocks_of(backbone):
    """Return the blocks, chunked or not."""
    found = []
    for stage in backbone.blocks:
        found += [b for b in stage if not isinstance(b, nn.Identity)] if isinstance(stage, nn.ModuleList) else [stage]
    return found


def recorded(seen):
    """Return a hook that records inputs and outputs."""
    return lambda module, args, out: seen.extend([args[0].detach().clone(), out.detach().clone()])


def hook(path):
    def apply(backbone, monkeypatch):
        seen = []
        for block in blocks_of(backbone):
            block.get_submodule(path).register_forward_hook(recorded(seen))
        return seen

    return apply


def hook_on_one_block(backbone, monkeypatch):
    seen = []
    blocks_of(backbone)[-1].register_forward_hook(recorded(seen))
    return seen


def hook_that_changes_results(backbone, monkeypatch):
    for block in blocks_of(backbone):
        block.attn.register_forward_hook(lambda module, args, out: out * 0.5)
    return []


def hook_on_all_modules(backbone, monkeypatch):
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 0.5 if isinstance(module, nn.GELU) else None
    )
    monkeypatch.callback(handle.remove)
    return []


def pre_hook(path):
    def apply(backbone, monkeypatch):
        for block in blocks_of(backbone):
            block.get_submodule(path).register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
        return []

    return apply


def pre_hook_on_blocks(backbone, monkeypatch):
    for block in blocks_of(backbone):
        block.register_forward_pre_hook(lambda module, args: (on_each(args[0], lambda x: x * 1.5),))
    return []


def full_backward_hook(backbone, monkeypatch):
    """Scale the gradient that leaves attention."""
    for block in blocks_of(backbone):
        block.attn.register_full_backward_hook(lambda module, of_in, of_out: (of_in[0] * 0.5, *of_in[1:]))
    return []


def on_each(x, function):
    return [function(one) for one in x] if isinstance(x, list | tuple) else function(x)


def attention_with_map(seen):
    """Return a ``forward`` that records the attention map, as visualisation scripts do; packed sequences use the
    original forward."""

    def forward(self, x, attn_bias=None):
        if attn_bias is not None:
            return type(self)._original(self, x, attn_bias=attn_bias) * 0.5
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        seen.append(weights.detach())
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C)) * 0.5

    return forward


def class_patch_of_attention(backbone, monkeypatch):
    seen, cls = [], type(blocks_of(backbone)[0].attn)
    monkeypatch.setattr(cls, "_original", cls.forward, raising=False)
    monkeypatch.setattr(cls, "forward", attention_with_map(seen))
    return seen


def instance_patch_of_attention(backbone, monkeypatch):
    seen = []
    for block in blocks_of(backbone):
        cls = type(block.attn)
        monkeypatch.setattr(cls, "_original", cls.forward, raising=False)
        block.attn.forward = types.MethodType(attention_with_map(seen), block.attn)
    return seen


def class_patch_of_mlp(backbone, monkeypatch):
    cls = type(blocks_of(backbone)[0].mlp)
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: original(self, x) * 0.5)
    return []


def instance_patch_of_a_linear_layer(backbone, monkeypatch):
    for block in blocks_of(backbone):
        original = block.attn.proj.forward
        block.attn.proj.forward = lambda x, original=original: original(x) * 0.5
    return []


def class_swap_of_attention(backbone, monkeypatch):
    for block in blocks_of(backbone):

        class Halved(type(block.attn)):
            def forward(self, x, **kwargs):
                return super().forward(x, **kwargs) * 0.5

        block.attn.__class__ = Halved
    return []


def class_swap_of_blocks(backbone, monkeypatch):
    for block in blocks_of(backbone):

        class Rolled(type(block)):
            def forward(self, x):
                return on_each(super().forward(x), lambda one: one.roll(1, -1))

        block.__class__ = Rolled
    return []


class Halved(nn.Module):
    """A module that replaces another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return on_each(self.inner(x), lambda one: one * 0.5)


def replaced_attention(backbone, monkeypatch):
    for block in blocks_of(backbone):
        block.attn = Halved(block.attn)
    return []


def replaced_mlp(backbone, monkeypatch):
    for block in blocks_of(backbone):
        block.mlp = Halved(block.mlp)
    return []


def replaced_norm(backbone, monkeypatch):
    for block in blocks_of(backbone):
        block.norm2 = nn.Identity()
    return []


def replaced_block(backbone, monkeypatch):
    for stage in [s for s in backbone.blocks if isinstance(s, nn.ModuleList)] or [backbone.blocks]:
        first = next(index for index, block in enumerate(stage) if not isinstance(block, nn.Identity))
        stage[first] = Halved(stage[first])
    return []


class LoRA(nn.Module):
    """Low-rank updates of queries and values beside ``qkv``, for tokens (B, N, D)."""

    def __init__(self, qkv, rank=4):
        super().__init__()
        self.qkv = qkv
        generator = torch.Generator().manual_seed(qkv.in_features)
        for name in ("q", "v"):
            for side, shape in (("down", (rank, qkv.in_features)), ("up", (qkv.in_features, rank))):
                weight = torch.randn(shape, generator=generator) * 0.1
                self.register_parameter(f"{name}_{side}", nn.Parameter(weight))

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x)
        of_q, of_v = ((x @ down.T) @ up.T for down, up in ((self.q_down, self.q_up), (self.v_down, self.v_up)))
        return qkv + torch.cat((of_q, of_q.new_zeros(B, N, D), of_v), dim=-1)


def lora_around_qkv(backbone, monkeypatch):
    for block in blocks_of(backbone):
        block.attn.qkv = LoRA(block.attn.qkv)
    return []


def weights_by_parametrization(backbone, monkeypatch):
    class HalvedWeight(nn.Module):
        def forward(self, weight):
            return weight * 0.5

    for block in blocks_of(backbone):
        nn.utils.parametrize.register_parametrization(block.attn.qkv, "weight", HalvedWeight())
    return []


HOOKS = {f"hook on {path}": hook(path) for path in ("attn", "attn.qkv", "attn.proj", "norm1", "mlp", "mlp.fc1")}
IDIOMS = {
    **HOOKS,
    **{
        function.__name__: function
        for function in (
            hook_on_one_block,
            hook_that_changes_results,
            hook_on_all_modules,
            pre_hook_on_blocks,
            full_backward_hook,
            class_patch_of_attention,
            instance_patch_of_attention,
            class_patch_of_mlp,
            instance_patch_of_a_linear_layer,
            class_swap_of_attention,
            class_swap_of_blocks,
            replaced_attention,
            replaced_mlp,
            replaced_norm,
            replaced_block,
            lora_around_qkv,
            weights_by_parametrization,
        )
    },
    **{f"pre-hook on {path}": pre_hook(path) for path in ("attn", "mlp", "mlp.fc2")},
}
