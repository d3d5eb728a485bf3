"""Batches on a stream of their own, with a stand-in for torch.cuda that records who waits for whom."""

import itertools
from contextlib import contextmanager

import torch

from dinov2_custom.data import train_loader
from dinov2_custom.data.loaders import make_train_loader
from dinov2_custom.data.prefetch import Copier
from tests.data.pictures import make_folder, train_config


class Recorder:
    """What :class:`Copier` uses of ``torch.cuda``; every call goes into ``calls``."""

    def __init__(self, calls):
        self.calls, self.events = calls, 0
        self.now = _Stream("step", calls)

    def Stream(self, device):  # noqa: N802 - torch's name
        return _Stream("side", self.calls)

    def Event(self, *, blocking):  # noqa: N802
        assert blocking  # else the host keeps a core busy while it waits
        self.events += 1
        return _Event(self.events, self.calls)

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def current_stream(self, device):
        return self.now


class _Stream:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def wait_event(self, event):
        self.calls.append(f"{self.name} waits for copy {event.number}")

    def synchronize(self):
        self.calls.append(f"host waits for all on {self.name}")


class _Event:
    def __init__(self, number, calls):
        self.number, self.calls = number, calls

    def record(self, stream):
        self.calls.append(f"copy {self.number} ends on {stream.name}")

    def synchronize(self):
        self.calls.append(f"host waits for copy {self.number}")


def test_copies_run_on_the_side_and_the_step_waits_for_them(monkeypatch):
    calls, kept = [], []
    cuda = Recorder(calls)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: kept.append((self, stream.name)))
    copier = Copier(torch.device("cpu"), cuda)
    x = torch.ones(2)

    def make():
        calls.append(f"made on {cuda.now.name}")
        return {"collated_global_crops": x, "upperbound": 3}

    copied = copier(make)
    assert copied.batch["collated_global_crops"] is x and not copied.is_done
    assert calls == ["made on side", "copy 1 ends on side", "step waits for copy 1"]
    assert [(tensor is x, name) for tensor, name in kept] == [(True, "step")]
    copied.wait()
    assert calls[3:] == ["host waits for copy 1"] and copied.is_done


def test_on_a_cpu_nothing_is_on_its_way():
    copied = Copier(torch.device("cpu"))(lambda: {"a": 1})
    assert copied.is_done and copied.batch == {"a": 1}
    copied.wait()


def test_a_slot_is_free_when_its_copy_has_ended_and_draws_count_what_was_taken(monkeypatch, tmp_path):
    """The loader itself: the host waits for a copy after the step that used it, then gives the slot back."""
    calls = []
    make_folder(tmp_path / "data", [f"{i}.png" for i in range(5)])
    loader = make_train_loader(train_config(str(tmp_path / "data"), num_workers=0), rank=0, world_size=1)
    expected = [batch["collated_global_crops"] for batch in itertools.islice(loader.batches(), 3)]
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(train_loader, "Copier", lambda device: Copier(device, Recorder(calls)))
    monkeypatch.setattr(train_loader.InProcess, "release", lambda self, slot: calls.append("slot given back"))
    monkeypatch.setattr(train_loader.InProcess, "close", lambda self: calls.append("memory given back"))
    batches = loader.batches()
    for number in range(1, 4):
        batch = next(batches)
        assert torch.equal(batch["collated_global_crops"], expected[number - 1])
        assert loader.draws == number * loader.builder.batch_size
        calls.append(f"step {number}")
    batches.close()
    per_step = ["copy {n} ends on side", "step waits for copy {n}", "step {n}", "host waits for copy {n}"]
    wanted = [text.format(n=n) for n in (1, 2, 3) for text in (*per_step, "slot given back")]
    # the third is still on its way
    assert calls == [*wanted[:-2], "host waits for all on side", "memory given back"]
