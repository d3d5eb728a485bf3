from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_custom.utils.transfer import to_host


def test_a_copy_is_complete_with_the_stream_of_its_own_gpu(monkeypatch):
    """The current device may be another one, whose stream does not make the copy."""
    recorded = []
    monkeypatch.setattr(
        torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda stream="": recorded.append(stream))
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device="current": f"stream of {device}")
    with FakeTensorMode():
        to_host(torch.zeros(3, device="cuda:1"))
    assert recorded == ["stream of cuda:1"]
