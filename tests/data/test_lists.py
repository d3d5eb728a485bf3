"""List files: .txt and .csv, relative paths, columns and missing parts."""

import os
import pickle
import time

import pytest

from dinov2_custom.data.index import cached, pack_stamps, pack_texts
from dinov2_custom.data.lists import ListSource, find_members
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.data.sources import real
from dinov2_custom.data.tar_shards import TarSource
from dinov2_custom.errors import DataError
from tests.data.pictures import encode, make_folder, picture
from tests.data.test_tar_shards import write


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_paths_are_relative_to_the_list(tmp_path, monkeypatch):
    make_folder(tmp_path, ["pics/a.png", "b c.png"])
    (tmp_path / "files.txt").write_text("b c.png\n\npics/a.png\r\n/elsewhere/c.jpg\n~/d.jpg\npics/é.jpg")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    monkeypatch.chdir(tmp_path)
    source = ListSource("files.txt")
    expected = [f"{tmp_path}/b c.png", f"{tmp_path}/pics/a.png", "/elsewhere/c.jpg", "/home/me/d.jpg"]
    assert names(source) == [*expected, f"{tmp_path}/pics/é.jpg"]
    assert source.read(0) == (tmp_path / "b c.png").read_bytes()
    with pytest.raises(DataError, match=r"expected a readable file: /elsewhere/c\.jpg \(FileNotFoundError"):
        source.read(2)
    assert names(pickle.loads(pickle.dumps(source))) == names(source)
    assert source.parts() == [(str(tmp_path / "files.txt"), 5)]
    assert names(ListSource("files.txt", root="/base"))[1] == "/base/pics/a.png"


def test_comments_and_blank_lines_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_folder(tmp_path, ["#x.png", "a#b.png"])
    file = tmp_path / "files.txt"
    file.write_text("# made by hand\n\n./#x.png\n  \t\n   # indented\r\n#x.png\na#b.png\n")
    os.utime(file, (1e9, 1e9))
    old = ["list", str(file), real(str(file)), "", str(tmp_path)]  # a listing from before comments were known
    stamps = pack_stamps([str(file)], [os.stat(file)], time.time_ns())
    arrays = pack_texts([["# made by hand"]], "path") | find_members({}, 1) | stamps
    cached(old, lambda on_count: on_count(1) or arrays, 1)
    source = ListSource(file, cache_from=1)
    assert names(source) == [f"{tmp_path}/./#x.png", f"{tmp_path}/a#b.png"]
    assert source.read(0) == (tmp_path / "#x.png").read_bytes() and source.index.file
    file.write_text("# nothing yet\n")
    with pytest.raises(DataError, match="expected paths of images, got an empty list"):
        ListSource(file)


def test_any_bytes_may_be_a_name(tmp_path):
    (tmp_path / "files.txt").write_bytes(b"\xef\xbb\xbfa.jpg\nb\xff.jpg\n")
    assert names(ListSource(tmp_path / "files.txt")) == [
        f"{tmp_path}/a.jpg",
        os.fsdecode(f"{tmp_path}/b".encode() + b"\xff.jpg"),
    ]


def test_column_of_a_csv(tmp_path):
    file = tmp_path / "files.csv"
    file.write_text('id,image ,label\n1,"a,b.png",cat\n2,,dog\n3\n4, c.png ,cat\n')
    for column in ("image", None):
        assert names(ListSource(file, column)) == [f"{tmp_path}/a,b.png", f"{tmp_path}/c.png"]
    assert names(ListSource(file, "label")) == [f"{tmp_path}/{label}" for label in ("cat", "dog", "cat")]
    file.write_text("anything\nx.png\n")
    assert names(ListSource(file)) == [f"{tmp_path}/x.png"]


@pytest.mark.parametrize("text, column, words", [
    ("id,image\n1,a.png\n", "img", ["a column 'img' in the first line", "got id, image"]),
    ("id,thing\n1,a.png\n", None, ["column=", "got id, thing"]),
    ("path,image\n1,a.png\n", None, ["column=", "got path, image"]),
    ("", "image", ["an empty file"]),
    ("image\n", "image", ["got an empty list"]),
])  # fmt: skip
def test_csv_mistakes(tmp_path, text, column, words):
    (tmp_path / "files.csv").write_text(text)
    with pytest.raises(DataError) as e:
        ListSource(tmp_path / "files.csv", column)
    for word in [str(tmp_path / "files.csv"), *words]:
        assert word in str(e.value)


def test_table_lines_without_a_path_are_logged(tmp_path, caplog):
    (tmp_path / "files.csv").write_text("label,path\n1,a.png\n2\n,,\n\n3,\n4,b.png\n")
    dataset = make_dataset(dataset_str=f"ImageList:path={tmp_path / 'files.csv'}")
    assert [dataset.name(i) for i in range(len(dataset))] == [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert dataset.passed_over() == [(str(tmp_path / "files.csv"), "2 lines without a path, the first is line 3")]
    assert "2 lines without a path" in caplog.text


def test_empty_and_missing_lists(tmp_path):
    (tmp_path / "files.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"got an empty list: .*files\.txt"):
        ListSource(tmp_path / "files.txt")
    with pytest.raises(DataError, match=r"expected a list file, got No such file or directory: .*nope\.txt; check"):
        ListSource(tmp_path / "nope.txt")
    with pytest.raises(DataError, match="expected a list file"):
        make_dataset(dataset_str=str(tmp_path / "nope.csv"))


def test_lines_may_name_images_in_tars(tmp_path, caplog):
    pictures = {f"{i}/{i}!.png": encode(picture(8, 6, seed=i)) for i in range(4)}
    write(tmp_path / "s-0.tar", dict(list(pictures.items())[:2]))
    write(tmp_path / "sub" / "s-1.tar", dict(list(pictures.items())[2:]))
    (tmp_path / "loose.png").write_bytes(b"loose")
    (tmp_path / "odd!name.png").write_bytes(b"odd")
    lines = [
        "sub/s-1.tar!3/3!.png",
        "loose.png",
        "s-0.tar!0/0!.png",
        "odd!name.png",
        "s-0.tar!no.png",
        "gone.tar!a.png",
    ]
    (tmp_path / "files.txt").write_text("\n".join([*lines, "s-0.tar!1/1!.png"]))
    listed = ListSource(tmp_path / "files.txt")
    for source in (listed, pickle.loads(pickle.dumps(listed))):
        read = [source.read(i) for i in (0, 1, 2, 3, 6)]
        assert read == [pictures["3/3!.png"], b"loose", pictures["0/0!.png"], b"odd", pictures["1/1!.png"]]
        for line, words in (
            (4, "nothing of that name: .*s-0.tar!no.png"),
            (5, "nothing of that name: .*gone.tar!a.png"),
        ):
            with pytest.raises(DataError, match=words):
                source.read(line)
    assert "expected a readable file: " in caplog.text and "gone.tar" in caplog.text
    assert source.name(2) == f"{tmp_path}/s-0.tar!0/0!.png"


def test_names_of_a_tar_source_are_a_list(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "s.tar"
    write(path, {f"{i}.png": encode(picture(8, 6, seed=i)) for i in range(5)})
    tar = TarSource(path)
    (tmp_path / "clean.txt").write_text("".join(f"{tar.name(i)}\n" for i in (4, 1)))
    for place in (path, tmp_path / "clean.txt"):
        os.utime(place, (1e9, 1e9))
    for _ in range(2):
        source = ListSource(tmp_path / "clean.txt", cache_from=1)
        assert [source.read(i) for i in range(2)] == [tar.read(4), tar.read(1)] and source.index.file
    write(path, {"1.png": b"new", "4.png": b"newer"})  # offsets move with it
    assert ListSource(tmp_path / "clean.txt", cache_from=1).read(0) == b"newer"


def test_lines_may_name_rows_of_parquet(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="NOT CHECKED: Parquet needs pyarrow (extra parquet)")
    import pyarrow as pa

    for name, rows in (("x", [b"a", b"b", b"c"]), ("y", [b"d"])):
        pq.write_table(pa.table({"image": rows}), tmp_path / f"{name}.parquet", row_group_size=2)
    (tmp_path / "files.txt").write_text(
        "x.parquet!2\nx.parquet!0\nx.parquet!3\nx.parquet!x\ngone.parquet!0\ny.parquet!0\n"
    )
    source = ListSource(tmp_path / "files.txt")
    assert [source.read(i) for i in (0, 1, 5)] == [b"c", b"a", b"d"]
    for line, words in ((2, "a row below 3"), (3, "FileNotFoundError"), (4, "a row below 0, the number in .*gone")):
        with pytest.raises(DataError, match=words):
            source.read(line)
    assert pickle.loads(pickle.dumps(source)).read(0) == b"c"


def test_list_is_a_dataset(tmp_path):
    make_folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "files.csv").write_text("path,x\nb.png,1\nmissing.png,2\na.png,3\n")
    for given in (str(tmp_path / "files.csv"), f"ImageList:path={tmp_path / 'files.csv'}:column=path"):
        dataset = make_dataset(dataset_str=given)
        assert len(dataset) == 3 and dataset[2][0].size == (20, 16) and dataset.shares()[0][1:] == (3, 1.0)
        with pytest.raises(DataError, match="missing.png"):
            dataset[1]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_semicolons_and_tabs_between_columns(tmp_path, mark):
    rows = [["id", "image", "label"], ["1", "a,b.png", "x"], ["2", "c.png", "y"]]
    (tmp_path / "files.csv").write_text("".join(mark.join(row) + "\r\n" for row in rows))
    assert names(ListSource(tmp_path / "files.csv")) == [f"{tmp_path}/a,b.png", f"{tmp_path}/c.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line, found", [
    ("a b.jpg  \t", "a b.jpg"),
    ('"a b.jpg"', "a b.jpg"),
    ("'a b.jpg' ", "a b.jpg"),
    ("  a.jpg", "a.jpg"),
    ("d\\e\\a.jpg", "d/e/a.jpg"),
    ("d/e\\a.jpg", "d/e\\a.jpg"),  # a name may hold one
    ("a.jpg 3", "a.jpg"),
    ("a b.JPG\tlymphocyte", "a b.JPG"),
    ('"a.jpg" 0', "a.jpg"),
    ("a.jpg,3", "a.jpg"),
    ("a.jpg copy.jpg", "a.jpg copy.jpg"),
    ("a.jpg.webp", "a.jpg.webp"),
    ("é/ü.png", "é/ü.png"),
])  # fmt: skip
def test_common_line_formats(tmp_path, encoding, line, found):
    (tmp_path / "files.txt").write_text(f"{line}\r\n\r\nlast.jpg\r\n", encoding=encoding, newline="")
    assert names(ListSource(tmp_path / "files.txt")) == [f"{tmp_path}/{found}", f"{tmp_path}/last.jpg"]


def test_utf_16_without_its_mark_is_refused(tmp_path):
    (tmp_path / "files.txt").write_bytes("a.jpg\nb.jpg\n".encode("utf-16-le"))
    with pytest.raises(DataError, match="files.txt; save it as UTF-8"):
        ListSource(tmp_path / "files.txt")


def test_a_table_without_a_header_keeps_its_first_image(tmp_path):
    (tmp_path / "files.csv").write_text("a.jpg,3\nb.jpg,4\n")
    assert names(make_dataset(dataset_str=str(tmp_path / "files.csv")).source) == [
        f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]  # fmt: skip
    (tmp_path / "files.tsv").write_text("7\ta,b.jpg\n8\tb.jpg\n")
    assert names(make_dataset(dataset_str=str(tmp_path / "files.tsv")).source) == [
        f"{tmp_path}/a,b.jpg", f"{tmp_path}/b.jpg"]  # fmt: skip
    (tmp_path / "files.csv").write_text("a.jpg,mask.png\n")
    with pytest.raises(DataError, match="column=.*got a.jpg, mask.png"):
        ListSource(tmp_path / "files.csv")


def test_a_json_object_per_line(tmp_path):
    file = tmp_path / "files.jsonl"
    file.write_text('{"label": 3, "path": "a.jpg"}\n\n{"path": "b c.jpg", "score": NaN}\n')
    assert names(make_dataset(dataset_str=str(file)).source) == [f"{tmp_path}/a.jpg", f"{tmp_path}/b c.jpg"]
    file.write_text('"a.jpg"\n"b.jpg"\n')
    assert names(ListSource(file)) == [f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg"]
    file.write_text('{"thing": "a.jpg"}\n{"other": 1}\n')
    for column, words in ((None, "line 2"), ("image", "a column 'image'")):
        with pytest.raises(DataError, match=words):
            ListSource(file, column)
    file.write_text("a.jpg\n")
    with pytest.raises(DataError, match="files.jsonl line 1"):
        ListSource(file)
