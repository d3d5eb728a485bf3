"""Shard weights, gradients and optimizer state over all processes with torch's FSDP2."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dinov2_custom import distributed
from dinov2_custom.utils.dtype import as_torch_dtype, resolve_dtype


def shard_part(part: nn.Module, precision, *, reshard: bool, gather_dtype: str = "fp32") -> None:
    """Shard a backbone or a head over all processes, by rows of its parameters, which must be equal in all processes.

    Each block of a backbone is gathered and freed separately, as is the rest of the backbone.

    Args:
        precision: the part's ``compute_precision`` section; gradients are summed in :func:`reduce_dtype`.
        gather_dtype: ``fp32``: weights are rounded to ``param_dtype`` when multiplied, as without
            sharding, so the results are the same; ``param_dtype``: all weights are rounded before they are sent.
        reshard: free gathered weights after the forward pass and gather them again in the backward pass.
    """
    device = next(part.parameters()).device
    dtype = resolve_dtype(precision.mixed_precision.param_dtype, device)
    summed = reduce_dtype(precision.mixed_precision.reduce_dtype, dtype)
    options = {
        "mesh": init_device_mesh(device.type, (distributed.get_global_size(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype if gather_dtype == "param_dtype" else None, reduce_dtype=summed, cast_forward_inputs=False
        ),
        "reshard_after_forward": reshard,
    }
    for block in part.all_blocks() if hasattr(part, "all_blocks") else ():
        fully_shard(block, **options)
        if hasattr(block, "forward_packed"):
            register_fsdp_forward_method(block, "forward_packed")
    fully_shard(part, **options)
    if hasattr(part, "cross_entropy"):
        register_fsdp_forward_method(part, "cross_entropy")
        register_fsdp_forward_method(part, "factors")
    # true for a backbone's features, and harmless, as no operation on them is in place (tests/test_parallel.py)
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")


def reduce_dtype(name: str, param_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sharded gradients are summed.

    ``auto`` is float32. So is ``fp16``, upstream's default, if there is no loss scaler to keep gradients within its
    range, i.e. unless the weights are also fp16.
    """
    if name == "auto" or (name == "fp16" and param_dtype != torch.float16):
        return torch.float32
    return as_torch_dtype(name)
