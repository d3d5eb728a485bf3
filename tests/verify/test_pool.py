import multiprocessing
import os
import signal
import time

import pytest

from dinov2_custom.errors import DataError
from dinov2_custom.verify.pool import Death, run_pool
from tests.verify.files import die

KILLS, HANGS, FAILS, ONCE = 7, 13, 21, 30


def square(i):
    return i * i


def moody(i):
    if i == KILLS:
        die(signal.SIGSEGV)
    if i == HANGS:
        time.sleep(1000)
    return i * i


def failing(i):
    return 1 // (i - FAILS)


def leave(i):
    os._exit(3)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("ordered", [False, True])
def test_every_item_once(workers, ordered):
    found = list(run_pool(square, range(101), workers=workers, chunk=4, ordered=ordered, window=16))
    assert sorted(found) == [(i, i * i) for i in range(101)]
    assert not ordered or found == sorted(found)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("ordered", [False, True])
def test_dead_and_hanging_processes_are_survived(workers, ordered):
    found = dict(run_pool(moody, range(40), workers=workers, chunk=4, ordered=ordered, window=24, time_limit_s=3.0))
    assert found.pop(KILLS) == Death("the process was killed by SIGSEGV while decoding it")
    assert found.pop(HANGS) == Death("took longer than 3 s")
    assert found == {i: i * i for i in range(40) if i not in (KILLS, HANGS)}


def test_an_item_gets_a_second_chance(tmp_path):
    def once(i):
        if i == ONCE and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            die(signal.SIGKILL)
        return i

    assert sorted(run_pool(once, range(40), workers=2, chunk=4)) == [(i, i) for i in range(40)]
    assert (tmp_path / "died").exists()


def test_exceptions_of_work_are_propagated():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(run_pool(failing, range(40), workers=2))


def test_window_bounds_what_is_under_way():
    drawn = []

    def items():
        for i in range(60):
            drawn.append(i)
            yield i

    for i, _ in run_pool(square, items(), workers=2, chunk=2, ordered=True, window=8):
        assert len(drawn) <= i + 1 + 8


def test_processes_that_never_work_end_the_run(monkeypatch):
    monkeypatch.setattr("dinov2_custom.verify.pool._serve", lambda *args: os._exit(3))
    with pytest.raises(DataError, match=r"died at once \(the last ended with exit code 3\)"):
        list(run_pool(square, range(4), workers=1))


def test_all_items_kill():
    found = dict(run_pool(leave, range(3), workers=2, chunk=2))
    assert {death.reason for death in found.values()} == {"the process ended with exit code 3 while decoding it"}
    assert sorted(found) == [0, 1, 2]


def test_processes_that_are_not_forked(monkeypatch):
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr("dinov2_custom.verify.pool.multiprocessing.get_context", lambda method: context)
    found = list(run_pool(moody, [1, KILLS, 2], workers=1, chunk=1, ordered=True))
    assert found == [(1, 1), (KILLS, Death("the process was killed by SIGSEGV while decoding it")), (2, 4)]


def test_processes_end_with_the_caller():
    pool = run_pool(square, range(100), workers=2, chunk=1)
    next(pool)
    assert len(multiprocessing.active_children()) == 2
    pool.close()
    assert multiprocessing.active_children() == []
