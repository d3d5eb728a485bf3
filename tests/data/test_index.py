"""The packed index: arbitrary strings, mapping, damage and locks."""

import logging
import os
import pathlib
import pickle
import time

import numpy as np
import pytest

from dinov2_custom.data import index as index_module
from dinov2_custom.data.index import (
    Index,
    PathTable,
    cache_file,
    cached,
    load,
    pack_stamps,
    pack_texts,
    save,
    stamps_hold,
)
from dinov2_custom.errors import DataError

NAMES = ["/a/ä ö.jpg", "", "/b/new\nline.png", os.fsdecode(b"/c/\xff.jpg"), "/d"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dinov2_custom"


def arrays(names=NAMES, place=None) -> dict[str, np.ndarray]:
    stamps = pack_stamps([str(place)], [os.stat(place)], time.time_ns()) if place else pack_stamps([], [], 0)
    return {**pack_texts([names], "path"), "number": np.arange(3, dtype=np.int32), **stamps}


def old(path):
    path.mkdir(parents=True)
    os.utime(path, (1e9, 1e9))
    return path


def test_path_table_holds_any_name_and_refuses_other_indices():
    table = PathTable(NAMES)
    assert list(table) == NAMES and len(table) == 5 and table[np.int64(3)] == NAMES[3]
    for i in (-1, 5):
        with pytest.raises(IndexError):
            table[i]
    assert len(PathTable([])) == 0 and list(pickle.loads(pickle.dumps(table))) == NAMES
    chunks = pack_texts([NAMES[:2], [], NAMES[2:]], "x")
    assert list(PathTable(index=Index(chunks), name="x")) == NAMES and chunks["x_ends"].dtype == np.uint64


def test_file_is_mapped_and_pickles_as_its_name(tmp_path):
    file = str(tmp_path / "deep" / "x.idx")
    assert load(file) is None
    save(file, arrays())
    index = load(file)
    table = PathTable(index=index)
    assert list(table) == NAMES and index["number"].tolist() == [0, 1, 2] and index["number"].dtype == np.int32
    assert os.listdir(tmp_path / "deep") == ["x.idx"]
    with pytest.raises(ValueError, match="read-only"):
        index["number"][0] = 1
    data = pickle.dumps((index, table))
    assert len(data) < 600 and list(pickle.loads(data)[1]) == NAMES
    save(file, arrays(["other"]))
    with pytest.raises(DataError, match="got another; run the command again"):
        pickle.loads(data)
    assert list(table) == NAMES  # an existing mapping remains valid


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:10], lambda data: data[:-1], lambda data: data + b"x",
    lambda data: b"DV2IDX99" + data[8:], lambda data: data[:40] + b"!" + data[41:], lambda data: b"\xff" * len(data),
])  # fmt: skip
def test_damaged_file_is_logged_and_rebuilt(tmp_path, cache, caplog, damage):
    place = old(tmp_path / "place")
    assert len(PathTable(index=cached(["k"], lambda on_count: [on_count(1), arrays(place=place)][1], 1))) == 5
    file = cache_file(["k"])
    with open(file, "rb") as source:
        data = source.read()
    with open(file, "wb") as out:
        out.write(damage(data))
    assert load(file) is None and "will be rebuilt" in caplog.text
    index = cached(["k"], lambda on_count: [on_count(1), arrays(["new"], place)][1], 1)
    assert list(PathTable(index=index)) == ["new"] and load(file) is not None


def test_index_is_valid_while_its_folders_are_unchanged(tmp_path):
    place = old(tmp_path / "place")
    index = Index(arrays(place=place))
    assert stamps_hold(index)
    (place / "new").touch()
    assert not stamps_hold(index)
    assert not stamps_hold(Index(arrays(place=place)))  # changed just now: it may change again within the same tick
    (place / "new").unlink()
    os.utime(place, (1e9, 1e9))
    assert stamps_hold(index)
    place.rmdir()
    assert not stamps_hold(index)
    assert not stamps_hold(Index(pack_stamps([str(tmp_path)], [None], time.time_ns())))


def test_small_things_leave_nothing_on_disk(cache):
    index = cached(["k"], lambda on_count: [on_count(9), arrays()][1], cache_from=10)
    assert index.file == "" and not cache.exists()


def test_unwritable_cache_folder_is_no_error(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "dinov2")
    (tmp_path / "cache").write_text("a file, where the folder would be")
    index = cached(["k"], lambda on_count: [on_count(9), arrays()][1], cache_from=1)
    assert index.file == "" and list(PathTable(index=index)) == NAMES and "kept in memory" in caplog.text


def test_half_written_file_is_never_seen(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module.os, "fsync", fail)
    with pytest.raises(OSError):
        save(str(tmp_path / "x.idx"), arrays())
    assert os.listdir(tmp_path) == []


def test_second_process_waits_for_the_first(tmp_path, cache):
    pytest.importorskip("fcntl", reason="NOT CHECKED: no file locks on this system")
    place, built = old(tmp_path / "place"), []

    def first(on_count):
        on_count(10)

        def second(on_count):
            built.append("second starts")
            on_count(5)
            with pytest.raises(index_module._LockHeld):
                on_count(10)
            built.append("second stops")
            raise KeyboardInterrupt  # waiting would deadlock: the first is in this thread

        with pytest.raises(KeyboardInterrupt):
            cached(["k"], second, 10)
        return arrays(place=place)

    cached(["k"], first, 10)
    assert built == ["second starts", "second stops"]


def test_index_written_while_waiting_is_taken(tmp_path, cache):
    pytest.importorskip("fcntl", reason="NOT CHECKED: no file locks on this system")
    place = old(tmp_path / "place")

    def lost_the_race(on_count):
        save(cache_file(["k"]), arrays(["by the other one"], place))
        raise index_module._LockHeld

    assert list(PathTable(index=cached(["k"], lost_the_race, 10))) == ["by the other one"]


def test_lister_that_died_is_replaced(tmp_path, cache):
    attempts = []

    def build(on_count):
        attempts.append(1)
        if len(attempts) == 1:
            raise index_module._LockHeld
        return arrays(place=old(tmp_path / "place"))

    assert list(PathTable(index=cached(["k"], build, 10))) == NAMES and os.path.exists(cache_file(["k"]))


def test_failed_listing_lets_others_list(cache):
    fcntl = pytest.importorskip("fcntl", reason="NOT CHECKED: no file locks on this system")

    def fail(on_count):
        on_count(10)
        raise DataError("no images")

    with pytest.raises(DataError):
        cached(["k"], fail, 10)
    with open(cache_file(["k"]) + ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_keys_do_not_collide():
    assert cache_file(["a", "b"]) != cache_file(["ab"]) != cache_file(["b", "a"])


@pytest.mark.parametrize("what", ["file", "folder", "none"])
def test_index_writable_by_others_is_rebuilt(tmp_path, cache, monkeypatch, caplog, what):
    place = tmp_path / "place"
    place.mkdir()
    os.utime(place, (1e9, 1e9))
    made = [len(PathTable(index=cached(["k"], lambda on_count: [on_count(9), arrays(place=place)][1], 1)))]
    target = cache if what == "folder" else pathlib.Path(cache_file(["k"]))
    if what == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    else:
        target.chmod(0o777)
    again = cached(["k"], lambda on_count: [on_count(9), arrays(["new"], place)][1], 1)
    assert list(PathTable(index=again)) == ["new"] and made == [5]
    assert bool(again.file) == (what == "file")
