"""Detect whether modules are as this package built them, so that computing from their weights equals calling them.

Users may hook, patch, wrap, subclass or replace modules at any time. Training checks before each step
(``train/ssl_meta_arch.py``); and calls modified ones as modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from torch.nn.modules import module as torch_module

from dinov2_custom.layers.attention import Attention, MemEffAttention
from dinov2_custom.layers.block import Block, BlockChunk, NestedTensorBlock
from dinov2_custom.layers.dino_head import DINOHead, WeightNormLinear
from dinov2_custom.layers.drop_path import DropPath
from dinov2_custom.layers.layer_scale import LayerScale
from dinov2_custom.layers.mlp import Mlp
from dinov2_custom.layers.swiglu_ffn import SwiGLUFFN, SwiGLUFFNFused

_SCALES, _DROPS = (LayerScale, nn.Identity), (DropPath, nn.Identity)
_OF_A_BLOCK = {
    "norm1": (nn.LayerNorm,),
    "attn": (Attention, MemEffAttention),
    "ls1": _SCALES,
    "drop_path1": _DROPS,
    "norm2": (nn.LayerNorm,),
    "mlp": (Mlp, SwiGLUFFN, SwiGLUFFNFused),
    "ls2": _SCALES,
    "drop_path2": _DROPS,
}
_OF_ATTENTION = dict.fromkeys(("qkv", "proj"), (nn.Linear,)) | dict.fromkeys(("attn_drop", "proj_drop"), (nn.Dropout,))
_OF_SWIGLU = dict.fromkeys(("w12", "w3"), (nn.Linear,))
# class -> its modules, which are bypassed when it is computed from weights, and their required classes
_PARTS: dict[type, dict[str, tuple[type, ...]]] = {
    Block: _OF_A_BLOCK,
    NestedTensorBlock: _OF_A_BLOCK,
    BlockChunk: {},
    Attention: _OF_ATTENTION,
    MemEffAttention: _OF_ATTENTION,
    Mlp: dict.fromkeys(("fc1", "fc2"), (nn.Linear,)) | {"act": (nn.GELU,), "drop": (nn.Dropout,)},
    SwiGLUFFN: _OF_SWIGLU,
    SwiGLUFFNFused: _OF_SWIGLU,
    DINOHead: {"last_layer": (WeightNormLinear,)},
    **dict.fromkeys((DropPath, LayerScale, WeightNormLinear), {}),
    **dict.fromkeys((nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear), {}),
}
_FORWARDS = {cls: cls.forward for cls in _PARTS}  # as defined here; users may replace them
_HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}
_FSDP = "torch.distributed.fsdp"


def find_change_of_all() -> str | None:
    """Return what was changed for all modules at once (a class's ``forward`` or a global hook), or None."""
    for cls, forward in _FORWARDS.items():
        if cls.forward is not forward:
            return f"another {cls.__name__}.forward"
    for name, what in _HOOKS.items():
        if getattr(torch_module, f"_global{name}"):
            return f"{what} on all modules"
    return None


def find_change(
    module: nn.Module, expected: Iterable[type] = (Block, NestedTensorBlock), name: str = "", sharded_for: str = ""
) -> str | None:
    """Return the first of ``module`` and its submodules that computing from weights would bypass, with the reason, or
    None. See also :func:`find_change_of_all`.

    Args:
        expected: the exact classes that the module may have.
        name: prefix of the reported name.
        sharded_for: method around which FSDP2 gathers the weights; if it does, its class and its hooks on the module
            are not modifications.
    """
    cls, own = type(module), vars(module) if module is not None else {}
    sharded = bool(sharded_for) and sharded_for in own and _is_fsdps(cls.__mro__[1:2])
    if sharded:
        cls = cls.__mro__[2]
    if cls not in expected:
        return f"{name} of class {cls.__module__}.{cls.__qualname__}"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        for hooks, what in _HOOKS.items():
            if own[hooks] and not (sharded and _is_fsdps(own[hooks].values())):
                return f"{what} on {name}"
    if "forward" in own or own.get("_compiled_call_impl") is not None:
        return f"another forward of {name}"
    if cls is nn.Dropout and module.p > 0:
        return f"dropout in {name}"
    if cls is nn.LayerNorm and module.bias is None:
        return f"no bias in {name}"
    modules = own["_modules"]
    for part, classes in _PARTS.get(cls, {}).items():
        change = find_change(modules.get(part), classes, f"{name}.{part}")
        if change is not None:
            return change
    return None


def _is_fsdps(things: Iterable) -> bool:
    return all(getattr(one, "__module__", "").startswith(_FSDP) for one in things)


def unmodified_blocks(blocks: nn.ModuleList, name: str) -> tuple[frozenset[nn.Module], list[str]]:
    """Return which of ``blocks``, or of the blocks in their chunks, are unmodified, and what is modified in the
    others."""
    found, changes = [], []
    for index, stage in blocks.named_children():
        chunked = isinstance(stage, BlockChunk)
        if chunked and (change := find_change(stage, (BlockChunk,), f"{name}.{index}")):
            changes.append(change)
            continue
        for number, block in stage.named_children() if chunked else [(index, stage)]:
            if chunked and isinstance(block, nn.Identity):
                continue  # before the chunk's own blocks
            change = find_change(block, name=f"{name}.{index}.{number}" if chunked else f"{name}.{index}",
                                 sharded_for="forward_packed")
            if change is None:
                found.append(block)
            else:
                changes.append(change)
    return frozenset(found), changes


def methods_of(cls: type, package: str = "dinov2_custom") -> dict[str, Callable]:
    """Return the methods of a class that this package defines, by name."""
    bases = [base for base in reversed(cls.__mro__) if base.__module__.startswith(package)]
    return {name: value for base in bases for name, value in vars(base).items() if callable(value)}
