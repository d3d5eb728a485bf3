"""Give the stand-in's "device" tensors real values: repeat each operation on the CPU.

Device memory is host memory, so a CUDA tensor has a CPU tensor over the same bytes, and what a kernel should have
written is written there. Slow, and meant to test a program's use of numbers computed on a GPU: it tests neither kernels
nor the asynchrony of copies, since all are finished before each operation.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_LIBRARY = ctypes.CDLL(None)
_UNCHANGED = ("aten::record_stream", "aten::set_")
_REAL = "c10d::"  # gloo really copies to the host and back
_ATTENTION = ("cudnn_attention", "flash_attention", "efficient_attention")


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the bytes of the CUDA tensor ``tensor``."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_like(tensor, device="cpu")
    data = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
    place = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(whole, *place)


class Computing(TorchDispatchMode):
    """Mode in which operations on CUDA tensors have their real results."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        _LIBRARY.cuda_host_finish()
        if torch.Tag.dynamic_output_shape in func.tags and any(map(_is_cuda, tree_leaves(args))):
            return tree_map(_moved, func(*tree_map(_mirrored, args), **tree_map(_mirrored, kwargs)))
        given = func(*args, **kwargs)
        _LIBRARY.cuda_host_finish()
        if not any(_is_cuda(one) for one in tree_leaves((args, kwargs, given))):
            return given
        name = func._schema.name
        if name in _UNCHANGED or name.startswith(_REAL) or _is_view(func, given, (args, kwargs)):
            return given
        wanted = _compute(func, *tree_map(_mirrored, (args, kwargs)))
        if isinstance(given, Tensor):
            return _filled(given, wanted)
        if isinstance(given, (tuple, list)):  # only the output of an attention is known
            values = [_filled(*pair) for pair in zip(given, wanted, strict=False)]
            return type(given)([*values, *given[len(values) :]])
        return wanted  # a number: whether two tensors are equal


def _is_cuda(one) -> bool:
    return isinstance(one, Tensor) and one.device.type == "cuda"


def _is_view(func, given, arguments) -> bool:
    """Return whether the result shares memory with an argument; for ``to``, ``reshape`` and others this varies."""
    if func._schema.is_mutable or not any(argument.alias_info for argument in func._schema.arguments):
        return False
    memory = {one.untyped_storage().data_ptr() for one in tree_leaves(arguments) if isinstance(one, Tensor)}
    return all(one.untyped_storage().data_ptr() in memory for one in tree_leaves(given) if isinstance(one, Tensor))


def _mirrored(one):
    if isinstance(one, torch.device):
        return torch.device("cpu")
    if isinstance(one, torch.Generator):
        return None
    return on_cpu(one) if _is_cuda(one) else one


def _moved(one):
    """Copy a CPU tensor's values to a CUDA tensor."""
    return _filled(torch.empty_like(one, device="cuda"), one) if isinstance(one, Tensor) else one


def _compute(func, args, kwargs):
    """Return func(*args, **kwargs) on the CPU, in float32 if the CPU has no 16-bit kernel."""
    name = func._schema.name
    if any(kind in name for kind in _ATTENTION):
        return _attention(name, args)
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        if func._schema.is_mutable:
            raise
        return func(*tree_map(_widened, args), **tree_map(_widened, kwargs))


def _widened(one):
    return one.float() if isinstance(one, Tensor) and one.dtype in (torch.bfloat16, torch.float16) else one


def _attention(name: str, args):
    """Return the output of attention without dropout, or the gradients of queries, keys and values."""
    gradient, q, k, v = (one.float() for one in args[:4]) if "backward" in name else (None, *map(_widened, args[:3]))
    scale = q.shape[-1] ** -0.5
    weights = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)
    if gradient is None:
        return (weights @ v,)
    of_weights = gradient @ v.transpose(-2, -1)
    of_scores = weights * (of_weights - (of_weights * weights).sum(dim=-1, keepdim=True)) * scale
    return of_scores @ k, of_scores.transpose(-2, -1) @ q, weights.transpose(-2, -1) @ gradient


def _filled(given, wanted):
    """Write ``wanted`` into what the operation returned."""
    if not isinstance(given, Tensor) or not isinstance(wanted, Tensor):
        return given
    target = on_cpu(given) if _is_cuda(given) else given
    if target.numel() and (target.data_ptr() != wanted.data_ptr()):
        target.copy_(wanted)
    return given
