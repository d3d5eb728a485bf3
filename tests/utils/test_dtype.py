"""Names of types, and what ``auto`` means on each device."""

import numpy as np
import pytest
import torch

from dinov2_custom.utils import dtype as module
from dinov2_custom.utils.dtype import as_torch_dtype, cpu_has_bf16, resolve_dtype


@pytest.mark.parametrize(
    "name, expected",
    [
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float64", torch.float64),
        ("half", torch.float16),
        ("float", torch.float32),
        ("uint8", torch.uint8),
        (np.float32, torch.float32),
        (np.dtype("int64"), torch.int64),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_names(name, expected):
    assert as_torch_dtype(name) is expected


@pytest.mark.parametrize("name", ["fp8", "auto", "", "datetime64", "O"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="expected the name of a number type"):
        as_torch_dtype(name)


@pytest.mark.parametrize(
    "capability, expected", [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16")]
)
def test_auto_on_cuda(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", "cuda") is as_torch_dtype(expected)


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_cpu(monkeypatch, native, expected):
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: native)
    assert resolve_dtype("auto", torch.device("cpu")) is expected


def test_auto_elsewhere_and_explicit_names():
    assert resolve_dtype("auto", "mps") is torch.float32
    assert resolve_dtype("fp16", "cpu") is torch.float16


@pytest.mark.parametrize(
    "text, expected",
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx512f avx512bw\n", False),
        ("model name\t: avx512_bf16\n", False),
    ],
)
def test_flags_of_the_cpu(monkeypatch, tmp_path, text, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_has_bf16(tmp_path / "cpuinfo") is expected


def test_torch_is_asked_first(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert cpu_has_bf16(tmp_path / "missing")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert not cpu_has_bf16(tmp_path / "missing")
