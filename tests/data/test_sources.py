"""Folder sources: names, bytes, parts and the cached listing."""

import errno
import os
import pickle

import pytest

from dinov2_custom.data.datasets import ImageDataset
from dinov2_custom.data.sources import MAX_IMAGE_BYTES, FolderSource, OpenFiles, read_file
from dinov2_custom.errors import DataError, ResourceError
from tests.data.pictures import make_folder
from tests.data.test_listing import touch


def test_source_reads_names_and_survives_pickling(tmp_path):
    paths = make_folder(tmp_path, ["a.png", "b.jpg"])
    source = pickle.loads(pickle.dumps(FolderSource(tmp_path)))
    assert len(source) == 2 and [source.name(i) for i in range(2)] == paths
    assert source.read(1) == (tmp_path / "b.jpg").read_bytes()
    os.remove(paths[0])
    with pytest.raises(DataError, match=r"a\.png \(FileNotFoundError"):
        source.read(0)


def test_home_is_expanded(tmp_path, monkeypatch):
    touch(tmp_path / "pics", "1.jpg")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert FolderSource("~/pics/").name(0) == str(tmp_path / "pics" / "1.jpg")


def test_parts_are_the_roots(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg", "c/note.txt")
    source = FolderSource([tmp_path / "b", tmp_path / "a", tmp_path / "c"])
    assert source.parts() == [(str(tmp_path / "b"), 1), (str(tmp_path / "a"), 2), (str(tmp_path / "c"), 0)]
    assert ImageDataset([tmp_path / "b", tmp_path / "a"]).shares() == [
        (str(tmp_path / "b"), 1, 1 / 3),
        (str(tmp_path / "a"), 2, 2 / 3),
    ]


def test_large_listing_is_kept_and_a_changed_folder_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    touch(tmp_path / "data", *[f"{folder}/{i}.jpg" for folder in "ab" for i in range(5)])
    for folder in (tmp_path / "data", tmp_path / "data" / "a", tmp_path / "data" / "b"):
        os.utime(folder, (1e9, 1e9))
    small = FolderSource(tmp_path / "data")
    assert small.index.file == "" and not (tmp_path / "cache").exists()
    first = FolderSource(tmp_path / "data", cache_from=10)
    assert list(first.paths) == list(small.paths) and os.path.dirname(first.index.file) == str(
        tmp_path / "cache" / "dinov2_custom"
    )
    with monkeypatch.context() as patched:
        patched.setattr("dinov2_custom.data.sources.Listing", None)  # so that listing again would fail
        again = FolderSource(tmp_path / "data", cache_from=10)
    assert list(again.paths) == list(first.paths) and again.parts() == first.parts()
    assert len(pickle.dumps(again)) < 1000 and pickle.loads(pickle.dumps(again)).name(7) == first.name(7)
    touch(tmp_path / "data", "b/new.jpg")
    assert len(FolderSource(tmp_path / "data", cache_from=10)) == 11
    assert len(FolderSource(tmp_path / "data", extensions=[".png", ".jpg"], cache_from=10)) == 11


def test_open_files_keeps_few_open_and_reads_parts(tmp_path):
    for i in range(5):
        (tmp_path / str(i)).write_bytes(bytes(range(10)))
    files = OpenFiles(2)
    for i in (0, 1, 2, 3, 4, 0):
        assert files.read(str(tmp_path / str(i)), 3, 2) == b"\3\4"
        assert len(files.descriptors) <= 2
    assert files.read(str(tmp_path / "0"), 8, 99) == b"\x08\x09"
    copy = pickle.loads(pickle.dumps(files))
    assert copy.descriptors == {} and copy.read(str(tmp_path / "1"), 0, 1) == b"\0"
    files.close()
    assert files.descriptors == {}


def test_names_no_file_can_have_are_data_errors():
    with pytest.raises(DataError, match="ValueError"):
        read_file("a\0b.jpg")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE])
def test_a_file_or_shard_that_the_system_refuses_is_a_data_error_with_the_reason(tmp_path, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    shard = tmp_path / "shard.tar"
    shard.write_bytes(bytes(100))
    with (
        monkeypatch.context() as patched,
        pytest.raises(DataError, match=f"expected a readable file: .*x.jpg .*{os.strerror(number)}"),
    ):
        patched.setattr(os, "open", refuse)
        read_file(tmp_path / "x.jpg")
    files = OpenFiles(2)
    files.read(str(shard), 0, 10)
    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(DataError, match=f"expected a readable file: shard.tar!a.jpg .*{os.strerror(number)}"):
        files.read_all(str(shard), 0, 10, "shard.tar!a.jpg")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    os.symlink("/dev/zero", tmp_path / "y.jpg")
    for name, kind in (("x.jpg", "named pipe"), ("y.jpg", "device"), (".", "folder")):
        with pytest.raises(DataError, match=f"expected a regular file: .*{kind}"):
            read_file(tmp_path / name)


def test_declared_sizes_are_checked_before_allocation(tmp_path):
    path = tmp_path / "sparse.jpg"
    with open(path, "wb") as file:
        file.truncate(10 << 30)
    for read in (lambda: read_file(path), lambda: OpenFiles(1).read_all(str(path), 0, 1 << 62, "x.tar!a.jpg")):
        with pytest.raises(DataError, match="at most 1,024 MiB.*(sparse|a).jpg; cut it into tiles"):
            read()
    os.truncate(path, 100)
    with pytest.raises(DataError, match="the file ends there"):
        OpenFiles(1).read_all(str(path), 0, MAX_IMAGE_BYTES, "x.tar!a.jpg")


@pytest.mark.parametrize(
    "error", [MemoryError(), *(OSError(n, "") for n in (errno.EMFILE, errno.ENFILE, errno.ENOMEM))]
)
def test_resource_exhaustion_does_not_mark_the_file_bad(tmp_path, monkeypatch, error):
    def refuse(*arguments):
        raise error

    (tmp_path / "x.jpg").write_bytes(b"1")
    monkeypatch.setattr(os, "open", refuse)
    for read in (lambda: read_file(tmp_path / "x.jpg"), lambda: OpenFiles(1).read_all("x.tar", 0, 1, "x.jpg")):
        with pytest.raises(ResourceError, match="x.jpg"):
            read()
