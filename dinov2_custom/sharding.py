"""Networks whose weights, gradients and optimizer state are shared out over all processes, by torch's FSDP2.

Not here: which part is sharded (``parallel.py``). Read :func:`shard_part` first.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dinov2_custom import distributed
from dinov2_custom.layers.layer_scale import LayerScale
from dinov2_custom.utils.dtype import as_torch_dtype, resolve_dtype


def shard_part(part: nn.Module, precision, *, reshard: bool) -> None:
    """Shard a backbone or a head over all processes, by rows of its parameters, which must be equal everywhere.

    Each block of a backbone is gathered and let go of on its own, and then what is left of it. The matrices of the
    blocks are gathered in ``param_dtype``, which is what they are multiplied in anyway; norms, LayerScale, tokens and
    heads in float32, so that results are those of the unsharded network.

    Args:
        precision: the part's ``compute_precision`` section; gradients are summed in :func:`reduce_dtype`.
        reshard: let go of gathered weights after the forward pass and gather them again in the backward pass.
    """
    device = next(part.parameters()).device
    dtype = resolve_dtype(precision.mixed_precision.param_dtype, device)
    mesh = init_device_mesh(device.type, (distributed.get_global_size(),))
    options = {"mesh": mesh, "reshard_after_forward": reshard}
    policy = {"reduce_dtype": reduce_dtype(precision.mixed_precision.reduce_dtype, dtype), "cast_forward_inputs": False}
    full, mixed = MixedPrecisionPolicy(**policy), MixedPrecisionPolicy(param_dtype=dtype, **policy)
    for block in part.all_blocks() if hasattr(part, "all_blocks") else ():
        if dtype != torch.float32:
            exact = [module for module in block.modules() if isinstance(module, nn.LayerNorm | LayerScale)]
            fully_shard(exact, mp_policy=full, **options)
        fully_shard(block, mp_policy=mixed, **options)
        register_fsdp_forward_method(block, "forward_packed")
    fully_shard(part, mp_policy=full, **options)
    if hasattr(part, "cross_entropy"):
        register_fsdp_forward_method(part, "cross_entropy")
    # True of a backbone's features, and harmless: no operation on them is in place (tests/test_parallel.py)
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view tensor")


def reduce_dtype(name: str, param_dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sharded gradients are summed.

    ``auto`` is float32. So is ``fp16``, upstream's default, where there is no loss scaler to keep gradients within its
    range, that is unless the weights are in fp16 too.
    """
    if name == "auto" or (name == "fp16" and param_dtype != torch.float16):
        return torch.float32
    return as_torch_dtype(name)
