"""ImageNet-22k: images read from tars by offset."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from dinov2_custom.data.datasets import ImageNet22k
from dinov2_custom.errors import DataError
from tests.data.pictures import encode, picture


def write_tar(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "tars").mkdir()
    images = [encode(picture(12, 9, i), "JPEG") for i in range(4)]
    write_tar(tmp_path / "tars" / "n02.tar", {"n02_1.JPEG": images[0], "n02_9.JPEG": gzip.compress(images[1])})
    write_tar(tmp_path / "tars" / "n01.tar", {"n01_3.JPEG": images[2], "n01_4.JPEG": images[3]})
    return str(tmp_path / "tars")


EXPECTED = [("n01", 0, 2), ("n01", 0, 3), ("n02", 1, 0), ("n02", 1, 1)]


def check(dataset) -> None:
    assert len(dataset) == 4 and dataset.get_targets().tolist() == [0, 0, 1, 1]
    assert dataset.get_class_ids().tolist() == ["n01", "n01", "n02", "n02"]
    for i, (class_id, target, seed) in enumerate(EXPECTED):
        assert dataset.get_class_id(i) == class_id and dataset[i][1] == target
        assert dataset.get_image_data(i).rstrip(b"\0") == encode(picture(12, 9, seed), "JPEG").rstrip(b"\0")
    assert dataset.name(3).endswith("n02.tar/n02_9.JPEG")


def test_tars_are_read_without_tables(root):
    check(ImageNet22k(root=root))


def test_dumped_tables_give_the_same(root, tmp_path):
    dataset = ImageNet22k(root=root, extra=str(tmp_path / "extra"))
    dataset.dump_extra()
    check(dataset)
    entries = np.load(tmp_path / "extra" / "entries.npy", allow_pickle=False)
    assert entries.dtype.names == ("class_index", "class_id", "start_offset", "end_offset", "filename")
    loaded = ImageNet22k(root=root, extra=str(tmp_path / "extra"))
    loaded[0]
    pickled = pickle.dumps(loaded)
    assert b"start_offset" not in pickled
    check(pickle.loads(pickled))


def test_upstreams_tables_with_padding_and_32_bit_offsets(root, tmp_path):
    """Check the images; upstream's end offset is the start of the next header, so the data include padding."""
    dataset = ImageNet22k(root=root)
    fields = [
        ("class_index", "<u4"),
        ("class_id", "U3"),
        ("start_offset", "<u4"),
        ("end_offset", "<u4"),
        ("filename", "U10"),
    ]
    table = np.zeros(4, dtype=fields)
    for i, entry in enumerate(dataset._entries):
        end = -(-int(entry["end_offset"]) // 512) * 512
        table[i] = (entry["class_index"], "", entry["start_offset"], end, entry["filename"])
    (tmp_path / "extra").mkdir()
    np.save(tmp_path / "extra" / "entries.npy", table)
    np.save(tmp_path / "extra" / "class-ids.npy", np.array(["n01", "n02"]))
    check(ImageNet22k(root=root, extra=str(tmp_path / "extra")))


def test_few_tars_stay_open(root):
    dataset = ImageNet22k(root=root, mmap_cache_size=1)
    for i in (0, 3, 1, 2):
        dataset.get_image_data(i)
        assert len(dataset._tars.descriptors) == 1
    open_now = list(dataset._tars.descriptors.values())
    assert pickle.loads(pickle.dumps(dataset))._tars.descriptors == {}
    del dataset
    with pytest.raises(OSError):
        os.fstat(open_now[0])


@pytest.mark.skipif(not hasattr(os, "pread"), reason="NOT CHECKED: no os.pread on this system, and no fork")
def test_reading_does_not_move_the_position_that_forks_share(root):
    dataset = ImageNet22k(root=root)
    dataset.get_image_data(1)
    assert os.lseek(next(iter(dataset._tars.descriptors.values())), 0, os.SEEK_CUR) == 0


def test_missing_and_broken_tars_are_errors(root, tmp_path):
    with pytest.raises(DataError, match="expected a folder of <class id>.tar, got .*nope"):
        ImageNet22k(root=str(tmp_path / "nope"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected images in"):
        ImageNet22k(root=str(tmp_path / "empty"))
    (tmp_path / "empty" / "n09.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="expected an uncompressed tar: .*n09.tar"):
        ImageNet22k(root=str(tmp_path / "empty"))
    dataset = ImageNet22k(root=root)
    (tmp_path / "tars" / "n01.tar").unlink()
    with pytest.raises(DataError, match="n01.tar/n01_3.JPEG"):
        dataset[0]


def test_what_a_truncated_tar_hides_is_logged(root, caplog):
    path = f"{root}/n01.tar"
    with open(path, "r+b") as file:
        file.truncate(2000)
    [(where, reason)] = ImageNet22k(root=root).passed_over()
    assert where == path and "truncated tar" in reason and f"skipped: {path}" in caplog.text
