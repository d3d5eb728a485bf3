"""Let torch.compile fuse what the step does between its matrix products, where it can and is asked to.

Compiled are the pieces of lean blocks, which keep what they keep without, and the cross-entropy of a chunk of logits.
Without ``train.lean`` the two branches of each block are compiled, which keep for the backward pass what the compiler
chooses. Blocks whose modules somebody changed are called as they are. Read :func:`compile_step` first.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom.layers.pieces import EAGER, Pieces
from dinov2_custom.layers.prototype_loss import fused_cross_entropy

if TYPE_CHECKING:
    from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2")
Compiler = Callable[[Callable], Callable]
_BRANCHES = ("attn_residual", "ffn_residual")


def is_wanted(setting: str) -> bool:
    """Resolve ``train.compile``; ``auto`` is off, as no device has been measured yet on which it pays."""
    return setting == "on"


def compile_step(model: SSLMetaArch, backend: str = "inductor") -> bool:
    """Compile the blocks' branches and the heads' loss in place; return whether that was possible.

    Compilation itself happens in the first step, and again for a shape that is new in kind. Without a working compiler
    (a C++ compiler on CPUs, Triton on GPUs) one warning says so and nothing changes.
    """
    start = time.perf_counter()
    try:
        _probe(model.device, backend)
    except Exception as e:  # the compiler's own errors share no base class
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        logger.warning(f"train.compile: expected a working compiler, got {reason[:200]}; going on without")
        return False
    install(model, functools.partial(torch.compile, backend=backend, fullgraph=True, dynamic=True))
    seconds = time.perf_counter() - start
    logger.info(f"train.compile: the compiler works (tried in {seconds:.1f} s); the first step compiles the rest")
    _time_first_step(model)
    return True


def install(model: SSLMetaArch, compiler: Compiler) -> None:
    """Let ``model`` call functions as ``compiler`` makes them; nothing is called yet.

    Args:
        compiler: function -> the function that stands in for it, for any number of tokens.
    """
    model.look_at_modules()
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
    """Return the pieces of lean blocks as ``compiler`` makes them."""
    return EAGER.compiled(lambda piece: _on_numbers(compiler(piece), piece))


def _on_numbers(compiled: Callable, piece: Callable) -> Callable:
    """Give it tensors alone, not what autograd knows of them, for which it would be compiled once more. Parameters stay
    what they are: the compiler takes their shape for fixed, and so the width of what is normalised by them."""

    @functools.wraps(piece)
    def call(*args):
        return compiled(*(one.detach() if type(one) is Tensor else one for one in args))

    return call


def compile_block(block: nn.Module, compiler: Compiler) -> None:
    """Compile a block's two branches as autograd differentiates them."""
    for name in _BRANCHES:
        setattr(block, name, compiler(getattr(block, name)))


def leave_out_changed(model: SSLMetaArch) -> None:
    """Let blocks with changed modules have their branches as they are: what was compiled would pass over the change."""
    unchanged = model.shortcuts.student | model.shortcuts.teacher
    for part in (model.student, model.teacher):
        for block in part["backbone"].all_blocks():
            for name in _BRANCHES if block not in unchanged else ():
                vars(block).pop(name, None)


def _time_first_step(model: SSLMetaArch) -> None:
    """Let the next call of ``forward_backward``, and only that, log how long it took."""

    def first(*args, **kwargs):
        del model.forward_backward  # the method is back
        start = time.perf_counter()
        losses = model.forward_backward(*args, **kwargs)
        logger.info(f"train.compile: the first batch took {time.perf_counter() - start:.1f} s, compilation included")
        return losses

    model.forward_backward = first


def _probe(device: torch.device, backend: str) -> None:
    """Compile and run something small, forward and backward."""
    x = torch.ones(8, device=device, requires_grad=True)
    torch.compile(lambda x: F.gelu(x).sum(), backend=backend)(x).backward()
