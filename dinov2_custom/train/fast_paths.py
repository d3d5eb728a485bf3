"""Faster paths through the step that give the same numbers: computing from weights instead of calling modules
(``train.lean``), compilation (``train.compile``), and the attention kernel that is faster for the run's shapes.

Users hook, patch and replace modules at any time, so they are checked in every step; blocks whose modules are changed
are called as they are.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.layers import DINOHead
from dinov2_custom.layers.backend import fastest_attention
from dinov2_custom.layers.pieces import EAGER, Pieces
from dinov2_custom.layers.prototype_loss import fused_cross_entropy
from dinov2_custom.layers.unmodified import find_change, find_change_of_all, methods_of, unmodified_blocks
from dinov2_custom.loss import DINOLoss, iBOTPatchLoss

if TYPE_CHECKING:
    from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2")
Compiler = Callable[[Callable], Callable]
_BRANCHES = ("attn_residual", "ffn_residual")
_LOSSES = {cls: methods_of(cls) for cls in (DINOLoss, iBOTPatchLoss)}  # as defined here; users may replace them


def takes_options(backbone: nn.Module) -> bool:
    """Return whether the methods of ``backbone`` accept ``draws`` and ``packed``; users' overrides have upstream's
    parameters."""
    methods = (getattr(backbone, name) for name in ("forward", "forward_features", "forward_features_list"))
    return all(_takes_options(getattr(method, "__func__", method)) for method in methods)


@functools.lru_cache(maxsize=64)  # called in every step, and takes a fifth of a millisecond
def _takes_options(function: Callable) -> bool:
    taken = inspect.signature(function).parameters
    return "packed" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values())


class Shortcuts(NamedTuple):
    """Which parts of the model are unmodified.

    Attributes:
        student, teacher: blocks of the two backbones.
        heads: whether all heads and their losses are unmodified.
        changes: descriptions of all other modifications.
    """

    student: frozenset[nn.Module] = frozenset()
    teacher: frozenset[nn.Module] = frozenset()
    heads: bool = False
    changes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Describe the modifications and their cost."""
        others = f" and {len(self.changes) - 1} more" if len(self.changes) > 1 else ""
        return (
            f"train.lean: expected modules as they were built, got {self.changes[0]}{others}; the blocks, "
            "heads or losses that contain it are called as modules, which keeps about twice as much for the backward "
            "pass, and all logits of a head at once; the results are the same "
            "(docs/drop-in.md, 'Hooks, patches, subclasses')"
        )


def find_shortcuts(model: SSLMetaArch) -> Shortcuts:
    """Check the modules of ``model`` in their current state."""
    everywhere = find_change_of_all()
    if everywhere is not None:
        return Shortcuts(changes=(everywhere,))
    blocks, changes, changed_heads = {}, [], []
    for side in ("student", "teacher"):
        for name, part in getattr(model, side).items():
            if name == "backbone":
                blocks[side], found = unmodified_blocks(part.blocks, f"{side}.{name}.blocks")
                if not takes_options(part):
                    blocks[side], found = frozenset(), [f"other parameters of {side}.{name}.forward_features"]
                changes += found
            else:
                changed_heads.append(find_change(part, (DINOHead,), f"{side}.{name}", sharded_for="cross_entropy"))
    changed_heads += [_find_changed_loss(getattr(model, name), name) for name in ("dino_loss", "ibot_patch_loss")]
    changed_heads = [change for change in changed_heads if change is not None]
    return Shortcuts(blocks["student"], blocks["teacher"], not changed_heads, (*changes, *changed_heads))


def _find_changed_loss(loss: nn.Module, name: str) -> str | None:
    change = find_change(loss, _LOSSES, name)
    if change is not None:
        return change
    for method, function in _LOSSES[type(loss)].items():
        if method in vars(loss) or getattr(type(loss), method) is not function:
            return f"another {method} of {name}"
    return None


def should_compile(setting: str) -> bool:
    """Resolve ``train.compile``; ``auto`` is off, as no device has been measured yet on which it is faster."""
    return setting == "on"


def compile_step(model: SSLMetaArch, backend: str = "inductor") -> bool:
    """Compile the blocks and the heads' loss in place; return whether that was possible.

    This compiles the pieces of lean blocks, which save the same tensors for the backward pass either way, or without
    ``train.lean`` the two branches of each block, which save what the compiler chooses; and the cross-entropy of a
    chunk of logits.

    Compilation itself happens in the first step, and again for a new kind of shape. Without a working compiler
    (a C++ compiler on CPUs, Triton on GPUs) a warning is logged and nothing changes.
    """
    start = time.perf_counter()
    try:
        _probe(model.device, backend)
    except Exception as e:  # the compiler's errors share no base class
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        logger.warning(f"train.compile: expected a working compiler, got {reason[:200]}; continuing without it")
        return False
    install(model, functools.partial(torch.compile, backend=backend, fullgraph=True, dynamic=True))
    seconds = time.perf_counter() - start
    logger.info(f"train.compile: the compiler works (tried in {seconds:.1f} s); the first step compiles the rest")
    _time_first_step(model)
    return True


def install(model: SSLMetaArch, compiler: Compiler) -> None:
    """Make ``model`` call functions compiled by ``compiler``; nothing is called yet.

    Args:
        compiler: maps a function to its compiled version, for any number of tokens.
    """
    model.update_shortcuts()
    if model.lean:
        model.pieces = compile_pieces(compiler)
    else:
        for block in model.shortcuts.student | model.shortcuts.teacher:
            compile_block(block, compiler)
    for part in (model.student, model.teacher):
        for name, head in part.items():
            if name != "backbone":
                head.chunk_loss = compiler(fused_cross_entropy)


def compile_pieces(compiler: Compiler) -> Pieces:
    """Return the pieces of lean blocks compiled by ``compiler``."""
    return EAGER.compiled(lambda piece: _on_numbers(compiler(piece), piece))


def _on_numbers(compiled: Callable, piece: Callable) -> Callable:
    """Pass detached tensors, as autograd metadata would cause another compilation. Parameters are passed unchanged: the
    compiler treats their shape, and so the width of the norms, as static."""

    @functools.wraps(piece)
    def call(*args):
        return compiled(*(one.detach() if type(one) is Tensor else one for one in args))

    return call


def compile_block(block: nn.Module, compiler: Compiler) -> None:
    """Compile a block's two branches as autograd differentiates them."""
    for name in _BRANCHES:
        setattr(block, name, compiler(getattr(block, name)))


def leave_out_changed(model: SSLMetaArch) -> None:
    """Restore the uncompiled branches of blocks with changed modules: compiled code would ignore the change."""
    unchanged = model.shortcuts.student | model.shortcuts.teacher
    for part in (model.student, model.teacher):
        for block in part["backbone"].all_blocks():
            for name in _BRANCHES if block not in unchanged else ():
                vars(block).pop(name, None)


def _time_first_step(model: SSLMetaArch) -> None:
    """Make the next call of ``forward_backward``, and only that, log its duration."""

    def first(*args, **kwargs):
        del model.forward_backward  # restores the method
        start = time.perf_counter()
        losses = model.forward_backward(*args, **kwargs)
        logger.info(f"train.compile: the first batch took {time.perf_counter() - start:.1f} s, compilation included")
        return losses

    model.forward_backward = first


def _probe(device: torch.device, backend: str) -> None:
    """Compile and run a small function, forward and backward."""
    x = torch.ones(8, device=device, requires_grad=True)
    torch.compile(lambda x: F.gelu(x).sum(), backend=backend)(x).backward()


def choose_attention(model) -> str:
    """Set the kernel of student and teacher, as the main process chooses; return a line for the log.

    All processes must call it after the model (``SSLMetaArch``) is on its device.
    """
    cfg, backbone = model.cfg, model.student["backbone"]
    if should_compile(cfg.train.compile):
        return ""  # a compiled block may only contain kernels that the compiler can trace
    batch, crops = cfg.train.batch_size_per_gpu, cfg.crops
    segments = [
        (number * batch, 1 + backbone.num_register_tokens + (size // backbone.patch_size) ** 2)
        for number, size in ((2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size))
        if number
    ]
    found = None
    if distributed.is_main_process():
        head_dim = backbone.embed_dim // backbone.num_heads
        dtype = model.precision("student", "backbone")
        found = fastest_attention(segments, backbone.num_heads, head_dim, dtype, model.device)
    backend, line = distributed.broadcast_object(found)
    for part in (model.student, model.teacher):
        for block in part["backbone"].all_blocks():
            if hasattr(getattr(block, "attn", None), "backend"):  # one of this package's, not a user's
                block.attn.backend = backend
    return line
