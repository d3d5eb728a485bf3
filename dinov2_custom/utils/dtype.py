"""Names of floating-point types, and the native one of each device: fp32, fp16, bf16, ``auto``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

_SHORT_NAMES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "half": torch.float16,
    "float": torch.float32,  # numpy's "float" has 64 bits
}
# P100, V100, A100, H100 and H200, B200.
# Source: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions"
_FAST_FLOAT64_CAPABILITIES = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
_NATIVE_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is Arm's


def as_torch_dtype(dtype: str | np.dtype | torch.dtype) -> torch.dtype:
    """Return the torch type of ``dtype``: a short name (``bf16``), a numpy name or type, or itself.

    Raises:
        ValueError: not the name of a type that torch has.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(dtype, str) and dtype in _SHORT_NAMES:
        return _SHORT_NAMES[dtype]
    try:
        return torch.from_numpy(np.empty(0, dtype=dtype)).dtype
    except TypeError as e:
        known = ", ".join(sorted(_SHORT_NAMES))
        raise ValueError(f"expected the name of a number type ({known}, float32, uint8, ...), got {dtype!r}") from e


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """Return :func:`as_torch_dtype`, or for ``auto`` the fastest safe type of ``device``.

    ``auto`` is bf16 where the device computes in it natively (CUDA from compute capability 8.0, CPUs with AVX512-BF16
    or AMX), fp16 on older CUDA devices, fp32 anywhere else.
    """
    if dtype != "auto":
        return as_torch_dtype(dtype)
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if has_bf16(device) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Return whether a CUDA device computes in bf16 natively."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def has_fast_float64(device: torch.device) -> bool:
    """Return whether ``device`` computes in float64 at half the rate of float32, rather than 1/32 or 1/64."""
    return device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_FLOAT64_CAPABILITIES
    )


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU has bf16 matrix instructions, by torch's report or the file ``cpuinfo``."""
    ask = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = ask()
    return any(capabilities.get(flag, False) for flag in _NATIVE_BF16_FLAGS) or _has_flag(cpuinfo)


def _has_flag(cpuinfo: Path) -> bool:
    try:
        text = cpuinfo.read_text()
    except OSError:  # not Linux
        return False
    lines = (line.partition(":") for line in text.splitlines())
    return any(
        _NATIVE_BF16_FLAGS & set(flags.split()) for key, _, flags in lines if key.strip() in ("flags", "Features")
    )
