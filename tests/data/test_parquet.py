"""Parquet and Arrow files with an image column."""

import os
import pickle
import sys

import pytest

from dinov2_custom.data import parquet
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.data.parquet import ParquetSource
from dinov2_custom.errors import DataError
from tests.data.pictures import encode, picture

PICTURES = [encode(picture(8, 6, seed=i)) for i in range(7)]


@pytest.fixture
def pa():
    pytest.importorskip("pyarrow.parquet", reason="NOT CHECKED: Parquet needs pyarrow (extra parquet)")
    import pyarrow

    return pyarrow


def table(pa, images, **others):
    return pa.table({"image": images, "label": list(range(len(images))), **others})


def structs(pictures):
    return [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)]


def write(pa, path, content, rows=2) -> str:
    pa.parquet.write_table(content, path, row_group_size=rows)
    return str(path)


@pytest.mark.parametrize("of", [list, structs])
def test_rows_of_several_files(pa, tmp_path, of):
    write(pa, tmp_path / "train-00000-of-00002.parquet", table(pa, of(PICTURES[:5])))
    write(pa, tmp_path / "train-00001-of-00002.parquet", table(pa, of(PICTURES[5:])))
    source = ParquetSource(tmp_path)
    assert len(source) == 7 and [source.read(i) for i in (6, 0, 3, 4, 5, 1, 2)] == [
        PICTURES[i] for i in (6, 0, 3, 4, 5, 1, 2)
    ]
    assert source.name(4) == f"{tmp_path}/train-00000-of-00002.parquet!4"
    assert source.name(6) == f"{tmp_path}/train-00001-of-00002.parquet!1"
    assert source.parts() == [(f"{tmp_path}/train-0000{i}-of-00002.parquet", n) for i, n in ((0, 5), (1, 2))]
    again = pickle.loads(pickle.dumps(source))
    assert again.read(5) == PICTURES[5]
    for given in (str(tmp_path / "train-{00000..00001}-of-00002.parquet"), f"Parquet:path={tmp_path}:column=image"):
        dataset = make_dataset(dataset_str=given)
        assert len(dataset) == 7 and dataset[3][0].tobytes() == picture(8, 6, seed=3).tobytes()
    for i in (-1, 7):
        with pytest.raises(IndexError):
            source.read(i)


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_are_read_in_place(pa, tmp_path, stream):
    path = tmp_path / "data-00000-of-00001.arrow"
    content = table(pa, structs(PICTURES))
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), content.schema) as out:
        out.write_table(content, max_chunksize=3)
    source = ParquetSource(path)
    assert [source.read(i) for i in range(7)] == PICTURES and source.name(4) == f"{path}!4"
    assert len(source._cache) == 0 and pickle.loads(pickle.dumps(source)).read(6) == PICTURES[6]


def test_an_arrow_stream_that_ends_between_two_batches_is_passed_over_and_one_within_is_refused(pa, tmp_path, caplog):
    rows, path = pa.table({"image": PICTURES}), tmp_path / "x.arrow"
    ends = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        for batch in rows.to_batches(max_chunksize=2):
            writer.write_batch(batch)
            ends.append(file.tell())
    whole = path.read_bytes()
    assert ParquetSource(path).passed_over() == []
    path.write_bytes(whole[: ends[0]])
    dataset = make_dataset(dataset_str=f"Parquet:path={path}")
    [(where, reason)] = dataset.passed_over()
    assert where == str(path) and "2 rows" in reason and f"skipped: {path}" in caplog.text and len(dataset) == 2
    path.write_bytes(whole[: ends[0] + 300])
    with pytest.raises(DataError, match="expected a Parquet or Arrow file: .*x.arrow .*got"):
        ParquetSource(path)


def test_few_row_groups_are_kept_and_others_forgotten(pa, tmp_path, monkeypatch):
    path = write(pa, tmp_path / "x.parquet", table(pa, PICTURES), rows=1)
    source = ParquetSource(path, cache_bytes=2 * len(PICTURES[0]) + 200)
    read = []
    original = parquet.ParquetReader.read
    monkeypatch.setattr(parquet.ParquetReader, "read", lambda self, g, c: read.append(g) or original(self, g, c))
    for i in (0, 1, 0, 1, 2, 0, 6):
        assert source.read(i) == PICTURES[i]
    assert read == [0, 1, 2, 0, 6] and len(source._cache) <= 2


def test_forked_process_opens_its_own_files(pa, tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("NOT CHECKED: no fork on this system")
    source = ParquetSource(write(pa, tmp_path / "x.parquet", table(pa, PICTURES)))
    source.read(0)
    readers = source._readers
    source._process = -1  # what a fork sees
    assert source.read(6) == PICTURES[6] and source._readers is not readers


def test_null_and_path_only_rows(pa, tmp_path):
    (tmp_path / "b.png").write_bytes(PICTURES[1])
    rows = [{"bytes": None, "path": "b.png"}, {"bytes": None, "path": None}, None, {"bytes": None, "path": "gone.png"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    source = ParquetSource(write(pa, tmp_path / "x.parquet", pa.table({"img": pa.array(rows, kind)})))
    assert source.read(0) == PICTURES[1]
    for i in (1, 2):
        with pytest.raises(DataError, match=rf"got null: .*x\.parquet!{i}"):
            source.read(i)
    with pytest.raises(DataError, match="gone.png"):
        source.read(3)


def test_which_column(pa, tmp_path):
    both = write(pa, tmp_path / "both.parquet", table(pa, PICTURES, other=PICTURES[::-1]))
    assert ParquetSource(both).read(0) == PICTURES[0]
    assert ParquetSource(both, "other").read(0) == PICTURES[6]
    for column in ("label", "nope"):
        with pytest.raises(DataError, match=f"expected image bytes in column '{column}', got .*label .int64"):
            ParquetSource(both, column)
    unusual = write(pa, tmp_path / "two.parquet", pa.table({"a": PICTURES, "b": PICTURES}))
    with pytest.raises(DataError, match=r"one column of image bytes, named with column=, got a \(binary\), b"):
        ParquetSource(unusual)
    assert ParquetSource(unusual, "b").read(2) == PICTURES[2]


def test_broken_empty_and_missing_files(pa, tmp_path):
    for name in ("x.parquet", "x.arrow"):
        (tmp_path / name).write_bytes(b"PAR1 and nothing else")
        with pytest.raises(DataError, match=rf"expected a Parquet or Arrow file: .*{name}"):
            ParquetSource(tmp_path / name)
    empty = write(pa, tmp_path / "empty.parquet", pa.table({"image": pa.array([], pa.binary())}))
    with pytest.raises(DataError, match="expected rows with images, got none"):
        ParquetSource(empty)
    with pytest.raises(DataError, match="missing"):
        ParquetSource(tmp_path / "nope.parquet")
    path = write(pa, tmp_path / "cut.parquet", table(pa, PICTURES))
    source = ParquetSource(path)
    with open(path, "r+b") as file:
        file.seek(10)
        file.write(b"\xff" * 200)
    with pytest.raises(DataError, match=r"expected a readable row: .*cut\.parquet!0"):
        source.read(0)


def test_large_row_groups_are_warned_of(pa, tmp_path, monkeypatch, caplog):
    path = write(pa, tmp_path / "x.parquet", table(pa, PICTURES))
    ParquetSource(path)
    assert caplog.text == ""
    monkeypatch.setattr(parquet, "LARGE_GROUP", 100)
    ParquetSource(path)
    assert "large row groups" in caplog.text


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    with pytest.raises(DataError, match=r"pip install 'dinov2_custom\[parquet\]'"):
        make_dataset(dataset_str=str(tmp_path / "x.parquet"))


def test_an_arrow_file_whose_offsets_do_not_fit_is_bad_and_does_not_crash_the_process(pa, tmp_path):
    path = tmp_path / "x.arrow"
    values = pa.array(PICTURES)
    batch = pa.record_batch({"image": values})
    with pa.ipc.new_stream(str(path), batch.schema) as writer:
        writer.write_batch(batch)
    offsets = values.buffers()[1].to_pybytes()
    data = path.read_bytes()
    assert data.count(offsets[: 4 * len(PICTURES)]) == 1
    place = data.index(offsets[: 4 * len(PICTURES)]) + 4 * 3
    path.write_bytes(data[:place] + (1 << 30).to_bytes(4, "little") + data[place + 4 :])
    source = ParquetSource(str(path))
    for i in range(len(source)):
        with pytest.raises(DataError, match=rf"x\.arrow!{i}"):
            source.read(i)


def test_ambiguous_or_nested_columns_are_rejected_in_one_sentence(pa, tmp_path):
    twice = pa.Table.from_arrays([pa.array(PICTURES)] * 2, names=["image", "image"])
    with pytest.raises(DataError, match="one column 'image', got 2 of that name.*a.parquet"):
        ParquetSource(write(pa, tmp_path / "a.parquet", twice))
    nested = pa.table({"image": [{"bytes": {"bytes": data}} for data in PICTURES]})
    with pytest.raises(DataError, match="expected one column of image bytes.*b.parquet"):
        ParquetSource(write(pa, tmp_path / "b.parquet", nested))


def test_a_row_group_with_fewer_rows_than_announced_is_bad_rows(pa, tmp_path, monkeypatch):
    source = ParquetSource(write(pa, tmp_path / "a.parquet", table(pa, PICTURES), rows=10))
    read = parquet.ParquetReader.read
    monkeypatch.setattr(parquet.ParquetReader, "read", lambda *arguments: read(*arguments).slice(0, 3))
    assert source.read(2) == PICTURES[2]
    with pytest.raises(DataError, match=r"a\.parquet!5"):
        source.read(5)
