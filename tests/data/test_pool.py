"""Processes that build batches: order, death of a process, signals and cleanup."""

import multiprocessing
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dinov2_custom.data import pool as ring_module
from dinov2_custom.data import pool as slots_module
from dinov2_custom.data.pool import MAX_DEATHS, Field, Ring, Slots, allocate, describe_exit
from dinov2_custom.errors import DataError
from tests.data import ring_builders as builders
from tests.data.ring_builders import IMAGES
from tests.processes import ENVIRONMENT, running, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


@pytest.fixture
def start():
    """Return a function that creates a ring, which is closed after the test."""
    rings = []

    def make(builder, num_workers=2, first_iteration=0, **options):
        rings.append(Ring(builder, num_workers, first_iteration, **options))
        return rings[-1]

    yield make
    for ring in rings:
        ring.close()
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("data-")]


def take(ring: Ring, number: int) -> list[tuple[list[int], list[str]]]:
    """Check the arrays of the next batches and return their (values, result)."""
    found = []
    for _ in range(number):
        built = ring.next_batch()
        values = built.arrays["values"].tolist()
        squares = built.arrays["square"][:, 4].tolist()
        assert all(square in (n**2, -1) for n, square in zip(values, squares, strict=True))
        found.append((values, list(built.result)))
        ring.release(built.slot)
    return found


def expected(number: int, first: int = 0) -> list[tuple[list[int], list[str]]]:
    return [([IMAGES * i + k for k in range(IMAGES)], []) for i in range(first, first + number)]


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_batches_come_in_order(start, num_workers):
    assert take(start(builders.Numbers(), num_workers, 4), 30) == expected(30, 4)


@pytest.mark.parametrize("method", [m for m in ("spawn", "forkserver") if m in multiprocessing.get_all_start_methods()])
def test_other_ways_to_start_processes(start, method, tmp_path):
    ring = start(builders.KilledOnce(tmp_path), 1, start_method=method)
    assert take(ring, 4) == expected(4)


def test_a_held_slot_is_not_filled_again(start):
    ring = start(builders.Numbers(), 1)
    held = ring.next_batch()
    before = held.arrays["values"].copy()
    assert take(ring, 10) == expected(10, 1)
    np.testing.assert_array_equal(held.arrays["values"], before)
    ring.release(held.slot)
    assert take(ring, 5) == expected(5, 11)


def test_a_killed_process_is_replaced_and_the_image_named(start, tmp_path, caplog):
    ring = start(builders.KilledOnce(tmp_path))
    assert take(ring, 8) == expected(8)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "was killed by SIGKILL (out of memory?) while it read image-7.jpg; it is replaced" in caplog.text


def test_an_image_that_kills_twice_counts_as_unreadable(start, caplog):
    ring = start(builders.Deadly())
    found = take(ring, 12)
    assert [values for values, _ in found] == [values for values, _ in expected(12)]
    bad = {i: result for i, (_, result) in enumerate(found) if result}
    assert sorted(bad) == [2, 6]
    assert bad[2] == ["two data-loading processes died of it, the last one ended with exit code 3"]
    assert len(caplog.records) == 4


def test_idle_process_that_is_killed_is_replaced(start, caplog):
    ring = start(builders.Numbers(), 1)
    take(ring, 3)
    while len(ring.done) < 2:
        ring._wait()
    os.kill(ring.workers[0].process.pid, signal.SIGKILL)
    assert take(ring, 6) == expected(6, 3)
    assert "between two images" in caplog.text


def test_processes_that_die_again_and_again_end_in_one_error(start, tmp_path):
    ring = start(builders.Starving(tmp_path))
    with pytest.raises(DataError, match=rf"got {MAX_DEATHS + 1} dead ones within.*image-\d+.jpg.*train.num_workers"):
        take(ring, 20)


def test_builder_errors_are_raised_when_the_batch_is_requested(start):
    ring = start(builders.Mistaken())
    assert take(ring, 2) == expected(2)
    with pytest.raises(DataError, match="a mistake at image 7") as e:
        ring.next_batch()
    assert "in accident" in str(e.value.__cause__)
    with pytest.raises(RuntimeError, match="Local: cannot travel"):
        start(builders.Unpicklable(), 1).next_batch()


def test_more_processes_can_be_used_later_but_all_are_started_at_once(start):
    """No process is forked once collectives may run: not to grow, nor to replace a dead one while spares remain."""
    ring = start(builders.Numbers(), 1, max_workers=4)
    started = {worker.process.pid for worker in (*ring.workers, *ring.spares)}
    assert len(started) == 4 and len(ring.workers) == 1 and take(ring, 3) == expected(3)
    ring.grow(3)
    assert len(ring.workers) == 3 and take(ring, 20) == expected(20, 3)
    os.kill(ring.workers[0].process.pid, signal.SIGKILL)
    assert take(ring, 20) == expected(20, 23)
    assert {worker.process.pid for worker in ring.workers} < started and not ring.spares
    ring.grow(9)
    assert len(ring.workers) == 3


def test_close_ends_busy_processes_at_once_and_twice_does_nothing():
    ring = Ring(builders.Slow(), 2, 0)
    processes = [worker.process.pid for worker in ring.workers]
    ring.close()
    ring.close()
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_ring_that_is_dropped_takes_its_processes_along():
    ring = Ring(builders.Slow(), 1, 0)
    pid = ring.workers[0].process.pid
    del ring
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


SCRIPT = """
import os, signal, sys, time
from dinov2_custom.data.pool import Ring
from tests.data import ring_builders

if __name__ == "__main__":
    main = os.getpid()

    def until_orphaned():
        while os.getppid() == main:
            time.sleep(0.01)

    if sys.argv[2] == "die at once":  # as on a busy machine: a forked process begins after this one is gone
        os.register_at_fork(after_in_child=until_orphaned)
    ring = Ring(ring_builders.Slow(), 2, 0, start_method=sys.argv[1])
    signal.signal(signal.SIGINT, lambda *args: None)
    signal.signal(signal.SIGTERM, lambda *args: None)
    print(*(worker.process.pid for worker in ring.workers), flush=True)
    if sys.argv[2] == "exit":
        sys.exit(0)
    os.killpg(0, signal.SIGINT)
    os.killpg(0, signal.SIGTERM)
    if sys.argv[2].startswith("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(6):
        ring.release(ring.next_batch().slot)
    print("went on", flush=True)
    ring.close()
"""


def run(tmp_path, *args) -> tuple[subprocess.CompletedProcess, list[int]]:
    (tmp_path / "script.py").write_text(SCRIPT)
    env = os.environ | ENVIRONMENT
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(tmp_path / "script.py"), *args]
    out, err = tmp_path / "out", tmp_path / "err"
    with open(out, "w") as o, open(err, "w") as e:
        code = subprocess.run(command, env=env, stdout=o, stderr=e, timeout=600, start_new_session=True).returncode
    done = subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())
    return done, [int(pid) for pid in done.stdout.splitlines()[0].split()]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_ignore_group_signals_and_leave_nothing_behind(tmp_path, method):
    done, pids = run(tmp_path, method, "go on")
    assert (done.returncode, done.stderr) == (0, "") and "went on" in done.stdout
    assert len(pids) == 2 and not running(pids)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_program_that_ends_without_closing_leaves_nothing(tmp_path, method):
    done, pids = run(tmp_path, method, "exit")
    assert (done.returncode, done.stderr) == (0, "") and not running(pids)


@pytest.mark.parametrize(("method", "when"), [("fork", "die"), ("fork", "die at once"), ("spawn", "die")])
def test_processes_end_when_the_main_one_was_killed(tmp_path, method, when):
    done, pids = run(tmp_path, method, when)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not running(pids), "the end of the processes")


def test_how_a_process_ended():
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-signal.SIGSEGV) == "was killed by SIGSEGV"
    assert describe_exit(-200) == "was killed by signal 200"


def test_a_ring_with_an_end_builds_no_more(start):
    ring = start(builders.Numbers(), 2, stop=3)
    assert take(ring, 3) == expected(3)
    assert ring.next_to_give == 3 and len(ring.free) == ring.slots.number


def test_hanging_process_and_image_are_logged_repeatedly(start, monkeypatch, caplog):
    monkeypatch.setattr(ring_module, "LOOK_S", 0.1)
    monkeypatch.setattr(ring_module, "SLOW_S", 0.2)
    ring = start(builders.Hanging(), 1, hang_s=1.5)
    pid = ring.workers[0].process.pid
    assert take(ring, 2) == expected(2)
    caplog.clear()  # a busy machine may be slow to start the process
    with pytest.raises(DataError, match=rf"no batch for \d s: data-loading process {pid} reads image-7.jpg; check"):
        ring.next_batch()
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) >= 2 and all(f"process {pid} reads image-7.jpg" in text for text in warned)


FIELDS = {"a": Field((3, 5)), "b": Field((2,), np.int64), "none": Field((0, 4)), "c": Field((7, 1), np.float32)}


def test_arrays_have_their_shapes_and_do_not_overlap():
    slots = Slots(FIELDS, 3, num_words=4)
    every = [slots.arrays(i) for i in range(3)]
    for n, arrays in enumerate(every):
        assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
            name: (f.shape, np.dtype(f.dtype)) for name, f in FIELDS.items()
        }
        for k, array in enumerate(arrays.values()):
            array[...] = 10 * n + k
    slots.words[:] = 99
    for n, arrays in enumerate(every):
        assert [np.unique(a).tolist() for a in arrays.values()] == [[10 * n], [10 * n + 1], [], [10 * n + 3]]
    assert np.shares_memory(slots.arrays(1)["a"], every[1]["a"]) and slots.words.tolist() == [99] * 4
    assert {name: a.shape for name, a in allocate(FIELDS).items()} == {name: f.shape for name, f in FIELDS.items()}


def test_slots_stay_valid_after_close_while_arrays_refer_to_them():
    slots = Slots(FIELDS, 1)
    array = slots.arrays(0)["b"]
    array[:] = 5
    slots.close()
    slots.close()
    assert array.tolist() == [5, 5]


@pytest.mark.parametrize("memfd", ["absent", "refused"])
def test_without_anonymous_memory_an_unnamed_file_is_used_and_logged(monkeypatch, tmp_path, caplog, memfd):
    def refuse(name):
        raise OSError("not here")

    if memfd == "absent":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    else:
        monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    monkeypatch.setattr(slots_module.tempfile, "gettempdir", lambda: str(tmp_path))
    caplog.set_level("INFO", logger="dinov2")
    slots = Slots(FIELDS, 2)
    slots.arrays(1)["b"][:] = 7
    assert slots.arrays(1)["b"].tolist() == [7, 7] and list(tmp_path.iterdir()) == []
    assert f"batches are passed through a file in {tmp_path}" in caplog.text


def test_no_room_is_one_error(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(slots_module.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(slots_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * 2**20))
    with pytest.raises(DataError, match="expected 19 MiB for batches in .*got 5 MiB free; set TMPDIR"):
        Slots({"a": Field((2**20,))}, 19)
