"""Listing folders: order, extensions, links, hidden files, and what goes wrong."""

import os
import pickle
import sys

import pytest

from dinov2_custom.data import sources
from dinov2_custom.data.sources import FolderSource, PathTable, list_images
from dinov2_custom.errors import DataError
from tests.data.pictures import make_folder

links = pytest.mark.skipif(sys.platform == "win32", reason="NOT CHECKED: symbolic links need rights on Windows")


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_nested_folders_in_sorted_order_with_all_extensions(tmp_path):
    names = ["b/2.PNG", "a.jpg", "b/10.jpeg", "b/c/d/e.Tiff", "z.webp", "B.bmp", "m.tif"]
    touch(tmp_path, *names, "notes.txt", "b/mask.npy", "noextension", "b/jpg")
    assert list_images([str(tmp_path)]) == sorted(str(tmp_path / name) for name in names)


def test_order_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    touch(tmp_path, *[f"{folder}/{i}.png" for folder in "cab" for i in (3, 1, 2)])
    expected = list_images([str(tmp_path)])
    scandir = os.scandir

    class Reversed:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *exc):
            return None

    monkeypatch.setattr(sources.os, "scandir", Reversed)
    assert list_images([str(tmp_path)]) == expected


def test_hidden_files_and_folders_are_skipped(tmp_path):
    touch(tmp_path, "seen.jpg", ".hidden.jpg", "._seen.jpg", ".cache/x.jpg")
    assert list_images([str(tmp_path)]) == [str(tmp_path / "seen.jpg")]


def test_several_roots_one_after_the_other_without_repeats(tmp_path):
    touch(tmp_path, "z/1.jpg", "a/2.jpg", "a/inner/3.jpg")
    roots = [str(tmp_path / "z"), str(tmp_path / "a"), str(tmp_path / "a" / "inner")]
    found = list_images(roots)
    assert [os.path.relpath(path, tmp_path) for path in found] == ["z/1.jpg", "a/2.jpg", "a/inner/3.jpg"]


@links
def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    touch(tmp_path / "data", "1.jpg")
    touch(tmp_path / "elsewhere", "2.jpg")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "file.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "data" / "nowhere").symlink_to(tmp_path / "not there")
    found = [os.path.relpath(path, tmp_path) for path in list_images([str(tmp_path / "data")])]
    assert found == ["data/1.jpg", "data/file.jpg", "data/more/2.jpg"]


def test_missing_roots_are_all_named(tmp_path):
    touch(tmp_path, "file.jpg")
    with pytest.raises(DataError) as e:
        list_images([str(tmp_path / "nope"), str(tmp_path / "file.jpg"), str(tmp_path)])
    assert f"{tmp_path / 'nope'} (missing)" in str(e.value) and "file.jpg (a file)" in str(e.value)
    assert "expected folders" in str(e.value) and "train.dataset_path" in str(e.value)


def test_folder_without_images_says_what_is_in_it(tmp_path):
    touch(tmp_path, "a.heic", "b.heic", "c/README")
    with pytest.raises(DataError) as e:
        list_images([str(tmp_path)])
    for words in (".jpg", "2 .heic", "1 files without extension", str(tmp_path), "convert"):
        assert words in str(e.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="got no files in"):
        list_images([str(tmp_path / "empty")])


def test_unreadable_folder_is_skipped_and_said(tmp_path, monkeypatch, caplog):
    touch(tmp_path, "1.jpg", "locked/2.jpg")
    scandir = os.scandir

    def refuse(folder):
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(sources.os, "scandir", refuse)
    assert list_images([str(tmp_path)]) == [str(tmp_path / "1.jpg")]
    assert "locked (PermissionError: Permission denied)" in caplog.text


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


def test_path_table_holds_any_name_and_refuses_other_indices():
    names = ["/a/ä ö.jpg", "", "/b/new\nline.png", os.fsdecode(b"/c/\xff.jpg"), "/d"]
    table = PathTable(names)
    assert list(table) == names and len(table) == 5
    for i in (-1, 5):
        with pytest.raises(IndexError):
            table[i]
    assert len(PathTable([])) == 0
