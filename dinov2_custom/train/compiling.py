"""Let torch.compile fuse what the step does between its matrix products, where it can and is asked to.

Two things are compiled: the two branches of every block, before anything wraps the blocks, and the cross-entropy of a
chunk of logits. Compiled branches keep for the backward pass what the compiler chooses, so they are not ``lean`` ones.
Read :func:`compile_step` first.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from dinov2_custom.layers.prototype_loss import chunk_cross_entropy

if TYPE_CHECKING:
    from dinov2_custom.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2")


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
    for part in (model.student, model.teacher):
        for block in part["backbone"].all_blocks():
            compile_block(block, backend)
        for name, head in part.items():
            if name != "backbone":
                head.chunk_loss = torch.compile(chunk_cross_entropy, backend=backend, fullgraph=True, dynamic=True)
    seconds = time.perf_counter() - start
    logger.info(f"train.compile: the compiler works (tried in {seconds:.1f} s); the first step compiles the rest")
    _time_first_step(model)
    return True


def compile_block(block: nn.Module, backend: str) -> None:
    """Compile a block's two branches, without graph breaks; token counts may change."""
    block.lean = False
    for name in ("attention_residual", "ffn_residual"):
        setattr(block, name, torch.compile(getattr(block, name), backend=backend, fullgraph=True, dynamic=True))


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
