"""Atomic writes, and folder locks with processes that are killed, forked and started simultaneously."""

import errno
import fcntl
import multiprocessing
import os
import signal
import stat
import time

import pytest

from dinov2_custom.files import (
    LockedError,
    atomic_write,
    cache_folder,
    locked,
    ours,
    parse_json,
    parse_json_object,
)
from tests.processes import wait_until

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_file_appears_whole_or_not_at_all(tmp_path, exclusive):
    path = tmp_path / "f"
    with pytest.raises(ZeroDivisionError), atomic_write(path, exclusive=exclusive) as file:
        file.write("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    for text in ("\udcff\n", "again\n"):
        with atomic_write(path, fsync=True, exclusive=exclusive) as file:
            file.write(text)
            assert path.exists() == (text == "again\n")
        assert path.read_bytes() == os.fsencode(text) and os.listdir(tmp_path) == ["f"]


def test_a_written_file_has_the_mode_that_any_new_file_has(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "f", "wb") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_what_a_killed_write_left_is_written_over(tmp_path):
    def killed():
        with atomic_write(tmp_path / "f", "wb") as file:
            file.write(b"a long torn one")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=killed)
    process.start()
    process.join(60)
    assert len(os.listdir(tmp_path)) == 1 and not (tmp_path / "f").exists()
    with atomic_write(tmp_path / "f", "wb") as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"x"


def test_several_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    with atomic_write(tmp_path / "f", exclusive=True) as first:
        with atomic_write(tmp_path / "f", exclusive=True) as second:
            second.write("second")
        first.write("first")
    assert (tmp_path / "f").read_text() == "first" and os.listdir(tmp_path) == ["f"]


def hold(path, held, until):
    with locked(path):
        held.set()
        until.wait()


def test_one_holds_it_until_it_ends(tmp_path):
    path, held, until = tmp_path / "lock", FORK.Event(), FORK.Event()
    for killed in (False, True):
        process = FORK.Process(target=hold, args=(path, held, until))
        process.start()
        assert held.wait(60)
        with pytest.raises(LockedError), locked(path):
            pass
        process.kill() if killed else until.set()
        process.join(60)
        with locked(path), pytest.raises(LockedError), locked(path):
            pass
        held.clear(), until.clear()


def test_a_child_does_not_keep_it_for_a_parent_that_was_killed(tmp_path):
    path, told = tmp_path / "lock", tmp_path / "child"

    def parent():
        with locked(path):
            if not os.fork():
                told.write_text(str(os.getpid()))
            signal.pause()

    process = FORK.Process(target=parent)
    process.start()
    child = int(wait_until(lambda: told.exists() and told.read_text(), "the child"))
    try:
        os.kill(child, signal.SIGSTOP)
        process.kill()
        process.join()  # with a time limit, it would wait for the child, too
        with locked(path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def enter(path, number, barrier, entered):
    """Try to take the lock; a holder deletes the file, as a rejected start in a new directory does."""
    barrier.wait()
    try:
        with locked(path):
            with entered.get_lock():
                entered.value += 1
                alone = entered.value == 1
            time.sleep(0.001)
            path.unlink()
            with entered.get_lock():
                entered.value -= 1
            os._exit(0 if alone else 3)
    except LockedError:
        os._exit(1)


def test_a_lock_deleted_by_its_holder_stays_exclusive(tmp_path):
    inside, rounds = 0, 15  # a broken lock fails in more than a third of the rounds
    for number in range(rounds):
        path, barrier, entered = tmp_path / f"{number}.lock", FORK.Barrier(4), FORK.Value("i", 0)
        processes = [FORK.Process(target=enter, args=(path, i, barrier, entered)) for i in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        assert set(codes) <= {0, 1} and 0 in codes, codes
        inside += codes.count(0)
    assert inside >= rounds


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock"), locked(tmp_path / "lock"):
        assert "this file system has no locks" in caplog.text


def test_a_folder_that_cannot_be_is_the_callers_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), locked(tmp_path / "file" / "lock"):
        pass


def test_a_cache_writable_by_others_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "dinov2_custom"
    assert cache_folder() == folder and not folder.exists()
    folder.mkdir(mode=0o700)
    assert cache_folder() == folder
    for mode in (0o770, 0o707):
        folder.chmod(mode)
        with pytest.raises(OSError, match="dinov2_custom belongs to another user, or others may write"):
            cache_folder()
    folder.chmod(0o755)
    assert ours(folder)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not ours(folder)
    with pytest.raises(OSError):
        cache_folder()


def test_without_a_home_there_is_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        cache_folder()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"a":' * 100_000, '{"a": 1, "a": 1}', '{"b": [{"a": 1, "a": 2}]}', "NaN", "[-Infinity]"]
    + ["1e999", "9" * 5000, b"\xff\xfe", b"\x80"],
    ids=range(12),
)
def test_invalid_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_objects_and_numbers():
    assert parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    assert parse_json('{"a": Infinity}', finite=False) == {"a": float("inf")}
    with pytest.raises(ValueError, match="expected a JSON object, got a list"):
        parse_json_object("[]")
