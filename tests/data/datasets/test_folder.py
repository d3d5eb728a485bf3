"""ImageDataset and LabelledFolder."""

import pickle

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.data.datasets import ImageDataset, LabelledFolder
from dinov2_custom.errors import DataError
from tests.data.pictures import encode, make_folder, picture


def upper_left(image):
    return image.getpixel((0, 0))


def double(target):
    return 2 * target


def test_unlabelled_samples_are_image_and_empty_tuple(tmp_path):
    paths = make_folder(tmp_path, ["b/1.png", "a.png"])
    dataset = ImageDataset(str(tmp_path))
    assert len(dataset) == 2 and [dataset.name(i) for i in range(2)] == paths
    for i, (image, target) in enumerate(dataset):
        assert image.mode == "RGB" and target == ()
        assert image.tobytes() == Image.open(paths[i]).tobytes()
    assert dataset.read(0) == (tmp_path / "a.png").read_bytes() == dataset.get_image_data(0)


def test_transforms_are_applied_and_pickled(tmp_path):
    make_folder(tmp_path, ["a.png"])
    dataset = pickle.loads(pickle.dumps(ImageDataset([tmp_path], transform=upper_left, target_transform=len)))
    pixel, target = dataset[0]
    assert pixel == Image.open(tmp_path / "a.png").getpixel((0, 0)) and target == 0
    both = ImageDataset(tmp_path, transforms=lambda image, target: (image.size, target))
    assert both[0] == ((20, 16), ())
    with pytest.raises(ValueError, match="either transforms or transform"):
        ImageDataset(tmp_path, transform=upper_left, transforms=lambda *both: both)


def test_extensions_and_orientation_are_options(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png", exif=exif)
    Image.new("RGB", (6, 4)).save(tmp_path / "b.bmp")
    assert len(ImageDataset(tmp_path, extensions=(".BMP",))) == 1
    assert ImageDataset(tmp_path)[0][0].size == (6, 4) and ImageDataset(tmp_path, exif=True)[0][0].size == (4, 6)


def test_broken_image_names_its_path(tmp_path):
    (tmp_path / "x.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"got 10 bytes of text: .*x\.jpg"):
        ImageDataset(tmp_path)[0]


def test_labelled_folder_sorts_classes_by_name(tmp_path):
    make_folder(tmp_path, ["dog/1.png", "cat/deep/2.png", "cat/1.png", "10/a.png", "9/a.png"])
    (tmp_path / "empty").mkdir()
    dataset = LabelledFolder(tmp_path, target_transform=double)
    assert dataset.classes == ["10", "9", "cat", "dog"] and dataset.class_to_idx["dog"] == 3
    targets = dataset.get_targets()
    assert targets.dtype == np.int64 and targets.tolist() == [0, 1, 2, 2, 3]
    assert [dataset[i][1] for i in range(5)] == [0, 2, 4, 4, 6]
    assert type(dataset.get_target(0)) is int
    assert all(f"/{dataset.classes[t]}/" in dataset.name(i).replace("\\", "/") for i, t in enumerate(targets))


def test_loose_images_are_skipped_with_a_warning_or_rejected(tmp_path, caplog):
    make_folder(tmp_path, ["loose.png"])
    with pytest.raises(DataError, match="expected a folder for each class, got 1 images right in"):
        LabelledFolder(tmp_path)
    make_folder(tmp_path, ["cat/1.png"])
    assert len(LabelledFolder(str(tmp_path) + "/")) == 1
    assert "skipped: " in caplog.text and "1 images right in it" in caplog.text


def test_suffix_selects_files_and_content_determines_the_format(tmp_path):
    image = picture(9, 7)
    for name, kind in (("a.jpg", "PNG"), ("b.png", "BMP"), ("c.tif", "WEBP"), ("d.jp2", "JPEG2000")):
        lossless = {"lossless": True} if kind == "WEBP" else {"irreversible": False} if kind == "JPEG2000" else {}
        (tmp_path / name).write_bytes(encode(image, kind, **lossless))
    dataset = ImageDataset(tmp_path)
    assert len(dataset) == 4 and all(one.tobytes() == image.tobytes() for one, _ in dataset)


def test_shares_of_any_dataset(tmp_path):
    make_folder(tmp_path, ["cat/1.png", "dog/1.png"])
    assert LabelledFolder(str(tmp_path)).shares() == [(f"LabelledFolder {tmp_path}", 2, 1.0)]
    folders = [tmp_path / f"{i}" for i in range(40)]
    for folder in folders:
        make_folder(folder, ["x.png"], 4, 4)
    assert len(ImageDataset(folders[:32]).shares()) == 32
    assert ImageDataset(folders).shares() == [(f"{tmp_path} (40 files or folders)", 40, 1.0)]
