"""ImageNet in upstream's layout, with and without the tables in extra/."""

import pickle

import numpy as np
import pytest

from dinov2_custom.data.datasets import ImageNet
from dinov2_custom.errors import DataError
from tests.data.pictures import make_folder, picture

TRAIN = ["n01/n01_7.JPEG", "n01/n01_10.JPEG", "n03/n03_2.JPEG"]
VAL = ["n03/ILSVRC2012_val_00000001.JPEG", "n01/ILSVRC2012_val_00000002.JPEG"]
TEST = ["ILSVRC2012_test_00000001.JPEG", "ILSVRC2012_test_00000005.JPEG"]


@pytest.fixture
def root(tmp_path):
    for split, names in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        make_folder(tmp_path / "data" / split, names)
    (tmp_path / "data" / "labels.txt").write_text('n01,"tench, fish"\nn02,unused\nn03,goldfish\n')
    return str(tmp_path / "data")


def summary(dataset) -> list:
    return [
        (dataset.name(i), dataset.get_target(i), dataset.get_class_id(i), dataset.get_class_name(i))
        for i in range(len(dataset))
    ]


def test_train_without_tables_lists_the_folders(root):
    dataset = ImageNet(split=ImageNet.Split.TRAIN, root=root)
    assert summary(dataset) == [
        (f"{root}/train/n01/n01_10.JPEG", 0, "n01", "tench, fish"),
        (f"{root}/train/n01/n01_7.JPEG", 0, "n01", "tench, fish"),
        (f"{root}/train/n03/n03_2.JPEG", 1, "n03", "goldfish"),
    ]
    image, target = dataset[2]
    assert target == 1 and image.size == (20, 16) and dataset.get_targets().tolist() == [0, 0, 1]
    assert dataset.find_class_id(1) == "n03" and dataset.find_class_name(0) == "tench, fish"
    assert dataset.split is ImageNet.Split.TRAIN


@pytest.mark.parametrize("split", ["TRAIN", "VAL", "TEST"])
def test_dumped_tables_give_the_same_and_survive_pickling(root, tmp_path, split):
    listed = ImageNet(split=split, root=root)
    dataset = ImageNet(split=split, root=root, extra=str(tmp_path / "extra"))
    dataset.dump_extra()
    loaded = ImageNet(split=split, root=root, extra=str(tmp_path / "extra"))
    assert isinstance(loaded._entries, np.memmap)
    pickled = pickle.dumps(loaded)
    assert b"actual_index" not in pickled, "the table itself was pickled"
    again = pickle.loads(pickled)
    assert summary(listed) == summary(dataset) == summary(loaded) == summary(again)
    assert again[0][0].tobytes() == listed[0][0].tobytes()


def test_tables_are_upstreams(root, tmp_path):
    extra = tmp_path / "extra"
    ImageNet(split="VAL", root=root, extra=str(extra)).dump_extra()
    entries = np.load(extra / "entries-VAL.npy", allow_pickle=False)
    assert entries.dtype.names == ("actual_index", "class_index", "class_id", "class_name")
    assert entries.tolist() == [(2, 0, "n01", "tench, fish"), (1, 1, "n03", "goldfish")]
    assert np.load(extra / "class-ids-VAL.npy", allow_pickle=False).tolist() == ["n01", "n03"]
    assert np.load(extra / "class-names-VAL.npy", allow_pickle=False).tolist() == ["tench, fish", "goldfish"]


def test_tables_of_a_pickle_are_refused(root, tmp_path):
    (tmp_path / "extra").mkdir()
    np.save(tmp_path / "extra" / "entries-VAL.npy", np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="[Oo]bject"):
        ImageNet(split="VAL", root=root, extra=str(tmp_path / "extra"))


def test_test_split_has_no_classes(root):
    dataset = ImageNet(split="TEST", root=root)
    assert [dataset.get_target(i) for i in range(2)] == [None, None] and dataset.get_targets() is None
    assert dataset.get_class_id(0) is None and dataset.get_class_name(0) is None
    assert dataset.name(1).endswith("test/ILSVRC2012_test_00000005.JPEG") and dataset[1][1] is None


def test_split_formats_and_parses_file_names():
    split = ImageNet.Split.TRAIN
    assert split.get_image_relpath(7, "n01") == "train/n01/n01_7.JPEG" and split.length == 1_281_167
    assert split.parse_image_relpath("train/n01/n01_7.JPEG") == ("n01", 7)
    assert ImageNet.Split.VAL.get_image_relpath(12, "n01") == "val/n01/ILSVRC2012_val_00000012.JPEG"
    assert ImageNet.Split.TEST.parse_image_relpath("test/ILSVRC2012_test_00000005.JPEG") == ("", 5)


def test_other_layouts_and_missing_folders_are_errors(tmp_path):
    with pytest.raises(DataError, match="missing"):
        ImageNet(split="TRAIN", root=str(tmp_path))
    (tmp_path / "train" / "n01").mkdir(parents=True)
    picture(4, 4).save(tmp_path / "train" / "n01" / "cat.JPEG")
    with pytest.raises(DataError, match=r"names like train/n01440764/n01440764_1.JPEG, got train/n01/cat.JPEG"):
        ImageNet(split="TRAIN", root=str(tmp_path))
    with pytest.raises(DataError, match="expected an extra folder"):
        (tmp_path / "train" / "n01" / "cat.JPEG").rename(tmp_path / "train" / "n01" / "n01_1.JPEG")
        ImageNet(split="TRAIN", root=str(tmp_path)).dump_extra()
