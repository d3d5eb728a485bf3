"""Listing folders: order, extensions, links, hidden files, progress and errors."""

import itertools
import logging
import os
import sys
import time

import pytest

from dinov2_custom.data import listing
from dinov2_custom.data.datasets import LabelledFolder
from dinov2_custom.data.listing import Listing, PatientMap, Progress, list_images
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.data.sources import FolderSource
from dinov2_custom.data.spec import DatasetSpec, parse_dataset
from dinov2_custom.data.tar_shards import find_files
from dinov2_custom.errors import DataError
from tests.data.pictures import encode, picture

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

    monkeypatch.setattr(listing.os, "scandir", Reversed)
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
    assert f"{tmp_path / 'nope'} (missing)" in str(e.value) and "file.jpg (a file; give its folder, or" in str(e.value)
    assert "expected folders" in str(e.value) and "train.dataset_path" in str(e.value)


@pytest.mark.parametrize("name, advice", [
    ("shard-0.tar", "Tar:path={}"), ("x.PARQUET", "Parquet:path={}"), ("x.arrow", "Parquet:path={}"),
    ("files.txt", "ImageList:path={}"), ("files.csv", "ImageList:path={}"), ("images.zip", "ImageList:path=.."),
])  # fmt: skip
def test_error_for_a_file_explains_how_to_use_it(tmp_path, name, advice):
    touch(tmp_path, name)
    with pytest.raises(DataError) as e:
        list_images([str(tmp_path / name)])
    assert advice.format(tmp_path / name) in str(e.value) and str(tmp_path / name) in str(e.value)


@pytest.mark.parametrize("marker", ["config.yaml", "prepare.json", "verify_results.jsonl"])
def test_output_of_our_commands_is_not_listed(tmp_path, marker, caplog):
    caplog.set_level("INFO", logger="dinov2")
    touch(tmp_path, "a.jpg", "runs/1/.lock", f"runs/1/{marker}", "runs/1/2.png", "runs/1/deep/3.png", "runs/4.jpg")
    assert list_images([str(tmp_path)]) == [str(tmp_path / "a.jpg"), str(tmp_path / "runs/4.jpg")]
    assert f"folder skipped: {tmp_path / 'runs/1'} (the output of a run" in caplog.text
    both = [str(tmp_path / "runs/1/2.png"), str(tmp_path / "runs/1/deep/3.png")]
    assert list_images([str(tmp_path / "runs/1")]) == both, "what is named is used"


def test_marker_alone_is_no_output_and_a_later_one_is_noticed(tmp_path):
    touch(tmp_path, "a/.lock", "a/1.jpg", "b/config.yaml", "b/2.jpg")
    assert len(list_images([str(tmp_path)])) == 2
    touch(tmp_path, "b/.lock")
    assert list_images([str(tmp_path)]) == [str(tmp_path / "a/1.jpg")]


def test_folder_with_only_outputs_is_reported_as_such(tmp_path):
    touch(tmp_path, "run/.lock", "run/config.yaml", "run/1.png")
    with pytest.raises(DataError, match="got 1 folders with the output of a run in"):
        list_images([str(tmp_path)])


def test_prepared_shards_in_a_folder_are_data(tmp_path):
    touch(tmp_path, "one/.lock", "one/prepare.json", "one/shard-000000.tar")
    assert find_files([str(tmp_path)], (".tar",), "tars") == [str(tmp_path / "one/shard-000000.tar")]


def test_error_for_folder_without_images_lists_its_contents(tmp_path):
    touch(tmp_path, "a.dcm", "b.dcm", "c/README")
    with pytest.raises(DataError) as e:
        list_images([str(tmp_path)])
    for words in (".jpg", "2 .dcm", "1 files without extension", str(tmp_path), "convert"):
        assert words in str(e.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="got no files in"):
        list_images([str(tmp_path / "empty")])


def test_unreadable_folder_is_skipped_and_logged(tmp_path, monkeypatch, caplog):
    touch(tmp_path, "1.jpg", "locked/2.jpg")
    scandir = os.scandir

    def refuse(folder):
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(listing.os, "scandir", refuse)
    assert list_images([str(tmp_path)]) == [str(tmp_path / "1.jpg")]
    assert "locked (unreadable: PermissionError: Permission denied)" in caplog.text
    caplog.clear()
    touch(tmp_path / "classes", "a/1.jpg", "a/locked/2.jpg", "3.jpg")
    labelled = LabelledFolder(tmp_path / "classes")
    reasons = {os.path.basename(path): reason for path, reason in labelled.passed_over()}
    assert "Permission denied" in reasons["locked"] and "1 images right in it" in reasons["classes"]
    assert caplog.text.count("skipped: ") == 2


def test_order_is_that_of_the_sorted_paths(tmp_path):
    names = [
        "a.jpg",
        "a/1.jpg",
        "a-b/1.jpg",
        "a.b/1.jpg",
        "a/b/c.jpg",
        "ab.jpg",
        "a0/x.jpg",
        "é.jpg",
        "é/1.jpg",
        "A.jpg",
    ]
    touch(tmp_path, *names)
    assert list_images([str(tmp_path)]) == sorted(str(tmp_path / name) for name in names)


@links
def test_links_to_images_are_not_resolved(tmp_path):
    touch(tmp_path / "elsewhere", "1.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    (tmp_path / "data" / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    assert [os.path.basename(path) for path in list_images([str(tmp_path / "data")])] == ["broken.jpg", "link.jpg"]


def test_no_file_is_statted_or_opened(tmp_path, monkeypatch):
    touch(tmp_path, *[f"{folder}/{i}.jpg" for folder in "ab" for i in range(20)])
    statted = []
    stat = os.stat
    monkeypatch.setattr(listing.os, "stat", lambda place, **options: statted.append(place) or stat(place, **options))
    monkeypatch.setattr("builtins.open", lambda *arguments: pytest.fail("a file was opened"))
    assert len(list_images([str(tmp_path)])) == 40
    assert sorted(set(map(str, statted))) == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "b")]


def test_shards_in_a_folder_are_pointed_out(tmp_path):
    touch(tmp_path, "a.tar", "b.tar")
    with pytest.raises(DataError, match=r"got 2 \.tar in .*; give Tar:path="):
        list_images([str(tmp_path)])


def test_threads_give_the_same_order(tmp_path, monkeypatch):
    touch(tmp_path, *[f"{a}/{b}/{i}.jpg" for a in "xyz" for b in range(20) for i in range(3)])
    expected = list_images([str(tmp_path)])
    monkeypatch.setattr(PatientMap, "waits", True)
    assert list_images([str(tmp_path)]) == expected and len(expected) == 180


def test_folder_that_disappears_during_listing_is_skipped(tmp_path):
    touch(tmp_path, "1.jpg")
    found = Listing()
    assert list(found.chunks(str(tmp_path / "gone"))) == []
    assert [path for path, _ in found.passed_over] == [str(tmp_path / "gone")]
    assert found.others["unreadable folders"] == 1 and found.stamps == [(str(tmp_path / "gone"), None)]


def test_slow_calls_go_to_threads_and_quick_ones_do_not():
    def wait(i: int) -> int:
        time.sleep(0.003)
        return i

    slow, quick = PatientMap(threads=8, probes=4), PatientMap(threads=8, probes=4)
    assert list(slow.map(wait, range(40))) == list(range(40)) and slow.waits and slow.calls == 4
    assert list(quick.map(lambda i: sum(range(20_000)) and i, range(40))) == list(range(40))
    assert quick.calls == 40 or quick.waits  # on a busy machine, calls appear to wait
    assert list(slow.map(wait, [])) == []


def test_progress_is_logged_at_growing_intervals(caplog):
    caplog.set_level(logging.INFO, "dinov2")
    now = itertools.count(0, 0.25)
    progress = Progress("listing", "files", clock=lambda: next(now))
    for _ in range(80):
        progress.add(1000)
    progress.end("7 images")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "listing: 2000 files, 4000 files/s"
    assert lines[1] == "listing: 6000 files, 4000 files/s"
    assert lines[-1] == "listing done: 80000 files, 3951 files/s 20.2 s 7 images" and len(lines) == 6


def test_quick_listing_logs_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dinov2")
    touch(tmp_path, "1.jpg")
    list_images([str(tmp_path)])
    assert caplog.text == ""


def test_non_images_are_counted_and_logged(tmp_path, caplog):
    data = {kind: encode(picture(8, 6), kind) for kind in ("PNG", "JPEG", "GIF", "PPM", "TIFF", "WEBP", "BMP")}
    files = {f"a.{kind.lower()}": content for kind, content in data.items()}
    files |= {"b.jfif": data["JPEG"], "c.JPE": data["JPEG"], "d.jpg": data["JPEG"], "e.tif": data["TIFF"]}
    files |= {f"plain_{kind}": data[kind] for kind in ("JPEG", "PNG", "WEBP")}  # without a suffix
    others = {"README": b"text", "a.txt": b"", "b.txt": b"", "c.xml": b""}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name, content in {**files, **others}.items():
            (tmp_path / folder / name).write_bytes(content)
    os.mkfifo(tmp_path / "a" / "pipe")
    with caplog.at_level("INFO"):
        dataset = make_dataset(dataset_str=[str(tmp_path / "a"), {"path": str(tmp_path / "b")}])
    assert len(dataset) == 2 * len(files)
    assert all(dataset[i][0].size == (8, 6) for i in range(len(dataset)))
    assert "4 .txt, 3 files without extension, 2 .xml" in caplog.text
    assert dataset.left_out() == {".txt": 4, "files without extension": 3, ".xml": 2}
    parts = make_dataset(dataset_str=[{"path": str(tmp_path / one), "weight": 1} for one in "ab"])
    assert parts.left_out() == dataset.left_out()


def test_patterns(tmp_path):
    for name in ("a/1.png", "a/b/2.PNG", "a/b/3.jpg", "c/4.png", "c/notes.txt", "[odd]/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def found(pattern):
        return [os.path.relpath(path, tmp_path) for path in FolderSource(str(tmp_path / pattern)).paths]

    assert found("**/*.png") == ["[odd]/5.png", "a/1.png", "c/4.png"]
    assert found("a/**") == ["a/1.png", "a/b/2.PNG", "a/b/3.jpg"]  # each once, though folders match too
    assert found("[ac]") == found("?") == ["a/1.png", "a/b/2.PNG", "a/b/3.jpg", "c/4.png"]
    assert found("[odd]") == ["[odd]/5.png"]  # an existing path is not a pattern
    assert FolderSource(str(tmp_path / "c" / "*")).left_out() == {".txt": 1}
    several = FolderSource([str(tmp_path / "c"), str(tmp_path / "a" / "*.png")])
    assert several.parts() == [(str(tmp_path / "c"), 1), (str(tmp_path / "a" / "*.png"), 1)]
    with pytest.raises(DataError, match=r"got 1 .txt \(quote a pattern on the command line.* in .*\*.txt"):
        FolderSource(str(tmp_path / "c" / "*.txt"))
    with pytest.raises(DataError, match=r"got no files \(quote a pattern .* in .*nothing\*"):
        FolderSource(str(tmp_path / "nothing*"))


def test_patterns_are_looked_up_at_every_start_and_in_strings(tmp_path):
    (tmp_path / "1.png").write_bytes(b"x")
    pattern = str(tmp_path / "*.png")
    assert len(FolderSource(pattern, cache_from=1)) == 1
    (tmp_path / "2.png").write_bytes(b"x")
    assert len(FolderSource(pattern, cache_from=1)) == 2
    assert parse_dataset(pattern) == DatasetSpec("ImageDataset", (pattern,))
    for name in ("x-0.tar", "x-1.tar"):
        (tmp_path / name).write_bytes(b"")
    assert find_files([str(tmp_path / "x-*.tar")], [".tar"], "tars") == [str(tmp_path / f"x-{i}.tar") for i in (0, 1)]
    with pytest.raises(DataError, match="matches no file"):
        find_files([str(tmp_path / "y-*.tar")], [".tar"], "tars")
