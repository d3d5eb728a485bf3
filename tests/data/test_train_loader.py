"""TrainLoader with real images: dying processes, the chosen number of processes, and cleanup."""

import itertools
import multiprocessing
import os
import signal
from contextlib import contextmanager

import pytest
import torch

from dinov2_custom.data import loaders, pool
from dinov2_custom.data.datasets import ImageDataset
from dinov2_custom.data.loaders import Copier, make_train_loader
from dinov2_custom.data.pool import AutoWorkers
from dinov2_custom.errors import DataError
from tests.data.pictures import make_folder, train_config

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
NUM_IMAGES = 7


class Deadly(ImageDataset):
    """Reading 3.png ends a data-loading process, as a crash of a decoder would."""

    deadly = "3.png"

    def get_image_data(self, index):
        if self.name(index).endswith(self.deadly) and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().get_image_data(index)


class Doomed(Deadly):
    """Reading any image ends a data-loading process."""

    deadly = ".png"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_folder(tmp_path / "data", [f"{i}.png" for i in range(NUM_IMAGES)])
    monkeypatch.setattr(loaders, "at_most_cores", lambda num_workers: num_workers)
    return str(tmp_path / "data")


def equal(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def take(folder, number, told=None, **train):
    loader = make_train_loader(
        train_config(folder, **train), rank=0, world_size=1, on_bad_image=lambda *story: (told or []).append(story)
    )
    return list(itertools.islice(loader, number))


def test_an_image_that_kills_its_reader_is_reported_and_replaced(folder, monkeypatch, caplog):
    monkeypatch.setattr(loaders, "make_dataset", lambda *, dataset_str: Deadly(dataset_str))
    told = [("", "")]
    found = take(folder, 9, told, num_workers=2, max_bad_fraction=0.5)
    ((path, reason),) = told[1:]
    assert path.endswith("3.png") and "two data-loading processes died of it" in reason
    assert {r.levelname for r in caplog.records} <= {"INFO", "WARNING"}
    assert caplog.text.count("was killed by SIGKILL") >= 2 and "3.png" in caplog.text

    class Broken(ImageDataset):
        def get_image_data(self, index):
            if self.name(index).endswith("3.png"):
                raise DataError("cannot be read")
            return super().get_image_data(index)

    monkeypatch.setattr(loaders, "make_dataset", lambda *, dataset_str: Broken(dataset_str))
    assert all(equal(a, b) for a, b in zip(found, take(folder, 9, max_bad_fraction=0.5), strict=True))


def test_images_that_all_kill_end_the_run_with_one_error(folder, monkeypatch):
    monkeypatch.setattr(loaders, "make_dataset", lambda *, dataset_str: Doomed(dataset_str))
    with pytest.raises(DataError, match="dead ones within|unreadable images"):
        take(folder, 9, num_workers=2, max_bad_fraction=1.0)


def test_auto_gives_the_same_batches_and_logs_its_choice(folder, monkeypatch, caplog):
    monkeypatch.setattr(pool, "num_cores", lambda: 3)
    caplog.set_level("INFO", logger="dinov2")
    found = take(folder, 14, num_workers="auto")
    assert all(equal(a, b) for a, b in zip(found, take(folder, 14), strict=True))
    assert caplog.text.count("(train.num_workers=auto): one loads") == 1


def decide(build_s, step_s, cores):
    auto = AutoWorkers(8, cores)
    for _ in range(AutoWorkers.WARM_UP):
        assert not auto.observe(100 * build_s, step_s)
    decided = [auto.observe(build_s, step_s) for _ in range(12)]
    assert decided.count(True) == 1 and decided[AutoWorkers.STEPS - AutoWorkers.WARM_UP - 1]
    return auto.first, auto.chosen


def test_auto_keeps_up_with_the_step_with_one_spare_process():
    assert decide(build_s=0.4, step_s=0.1, cores=16) == (2, 5)
    assert decide(build_s=0.01, step_s=0.1, cores=16) == (2, 2)
    assert decide(build_s=5.0, step_s=0.1, cores=12) == (2, 12)
    assert decide(build_s=5.0, step_s=0.1, cores=200) == (2, 16)
    assert decide(build_s=5.0, step_s=0.0, cores=1) == (1, 1)


def test_abandoned_batches_leave_no_process(folder):
    loader = make_train_loader(train_config(folder, num_workers=2), rank=0, world_size=1)
    batches = loader.batches(5)
    next(batches)
    assert [p for p in multiprocessing.active_children() if p.name.startswith("data-")]
    del batches
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("data-")]


def test_batch_is_unchanged_while_the_next_ones_are_built(folder):
    batches = make_train_loader(train_config(folder, num_workers=1), rank=0, world_size=1).batches()
    first = next(batches)
    copy = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in first.items()}
    for _ in range(8):
        next(batches)
    assert equal(first, copy)


class FakeCudart:
    """The pinning functions of CUDA's runtime; registering memory returns ``error``."""

    def __init__(self, error: int):
        self.error = error
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address, size, flags):
        if not self.error:
            self.registered[address] = size
        return self.error

    def cudaHostUnregister(self, address):
        del self.registered[address]


@pytest.mark.parametrize("error", [0, 801])
def test_slots_are_pinned_once_and_unpinned_or_failure_is_logged(folder, monkeypatch, caplog, error):
    runtime, cleared = FakeCudart(error), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pool, "_clear_cuda_error", lambda: cleared.append(error))
    caplog.set_level("INFO", logger="dinov2")
    builder = make_train_loader(train_config(folder), rank=0, world_size=1).builder
    ring = pool.PinnedRing(builder, 1, 0, max_workers=16)
    assert not runtime.registered
    used = {ring.slots.bytes_of(ring.next_batch().slot).ctypes.data}
    for _ in range(2):
        built = ring.next_batch()
        ring.release(built.slot)
        used.add(ring.slots.bytes_of(built.slot).ctypes.data)
    assert ring.slots.number == 33 and len(used) <= 3
    assert runtime.registered == ({} if error else dict.fromkeys(used, ring.slots.slot_size))
    assert caplog.text.count("could not be pinned (CUDA error 801)") == len(cleared) == bool(error)
    ring.close()
    ring.close()
    assert not runtime.registered


class Recorder:
    """The parts of ``torch.cuda`` used by :class:`Copier`; every call is recorded in ``calls``."""

    def __init__(self, calls):
        self.calls, self.events = calls, 0
        self.now = _Stream("step", calls)

    def Stream(self, device):  # noqa: N802 - torch's name
        return _Stream("side", self.calls)

    def Event(self, *, blocking):  # noqa: N802
        assert blocking  # otherwise waiting keeps a core busy
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


def test_copies_use_a_side_stream_and_the_step_waits_for_them(monkeypatch):
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


def test_copies_on_a_cpu_are_synchronous():
    copied = Copier(torch.device("cpu"))(lambda: {"a": 1})
    assert copied.is_done and copied.batch == {"a": 1}
    copied.wait()


def test_a_slot_is_free_when_its_copy_has_ended_and_draws_count_what_was_taken(monkeypatch, tmp_path):
    """The host waits for a copy after the step that used it and then releases the slot."""
    calls = []
    make_folder(tmp_path / "data", [f"{i}.png" for i in range(5)])
    loader = make_train_loader(train_config(str(tmp_path / "data"), num_workers=0), rank=0, world_size=1)
    expected = [batch["collated_global_crops"] for batch in itertools.islice(loader.batches(), 3)]
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(loaders, "Copier", lambda device: Copier(device, Recorder(calls)))
    monkeypatch.setattr(pool.InProcess, "release", lambda self, slot: calls.append("slot given back"))
    monkeypatch.setattr(pool.InProcess, "close", lambda self: calls.append("memory given back"))
    batches = loader.batches()
    for number in range(1, 4):
        batch = next(batches)
        assert torch.equal(batch["collated_global_crops"], expected[number - 1])
        assert loader.draws == number * loader.builder.batch_size
        calls.append(f"step {number}")
    batches.close()
    per_step = ["copy {n} ends on side", "step waits for copy {n}", "step {n}", "host waits for copy {n}"]
    wanted = [text.format(n=n) for n in (1, 2, 3) for text in (*per_step, "slot given back")]
    # the third copy is still in progress
    assert calls == [*wanted[:-2], "host waits for all on side", "memory given back"]
