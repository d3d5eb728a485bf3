"""Dataset strings: all spellings, quoting, paths that look like strings, and mistakes."""

from pathlib import Path

import pytest

from dinov2_custom.data.spec import DatasetSpec, parse_dataset
from dinov2_custom.errors import ConfigError


def folder(*roots: str) -> DatasetSpec:
    return DatasetSpec("ImageDataset", roots)


@pytest.mark.parametrize("text, expected", [
    ("/my/images", folder("/my/images")),
    ("/my/images/", folder("/my/images")),
    ("images", folder("images")),
    ("./x:y=z", folder("x:y=z")),
    ("/a/k=v/b:c", folder("/a/k=v/b:c")),
    (r"C:\pics\new", folder(str(Path(r"C:\pics\new")))),
    ("D:/pics", folder("D:/pics")),
    (Path("/my/images"), folder("/my/images")),
    (["/a", "/b"], folder("/a", "/b")),
    (["/a", "ImageFolder:root=/b:root=/c"], folder("/a", "/b", "/c")),
    ("ImageDataset:root=/x", folder("/x")),
    ("ImageFolder:root=/x:", folder("/x")),
    ("RecursiveImageDataset:root=/x/", folder("/x")),
    ('ImageDataset:root="/a:b=c"', folder("/a:b=c")),
    ("ImageDataset:root=/a=b", folder("/a=b")),
    (r"ImageDataset:root=C:\pics", folder(str(Path(r"C:\pics")))),
    ("LabelledFolder:root=/x", DatasetSpec("LabelledFolder", ("/x",))),
    ("ImageNet:split=TRAIN:root=/i:extra=/e",
     DatasetSpec("ImageNet", ("/i",), {"split": "TRAIN", "extra": "/e"})),
    ("ImageNet:root=/i:split=VAL", DatasetSpec("ImageNet", ("/i",), {"split": "VAL"})),
    ("ImageNet22k:root=/i:extra=/e", DatasetSpec("ImageNet22k", ("/i",), {"extra": "/e"})),
])  # fmt: skip
def test_parses(text, expected):
    assert parse_dataset(text) == expected


def test_home_is_expanded_everywhere(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert parse_dataset("~/x") == parse_dataset("RecursiveImageDataset:root=~/x") == folder("/home/me/x")
    assert parse_dataset("ImageNet22k:root=~/i:extra=~/e").options == {"extra": "/home/me/e"}


def test_what_exists_as_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "ImageNet:split=TRAIN:root=x"
    (tmp_path / name).mkdir()
    assert parse_dataset(name) == folder(name)


@pytest.mark.parametrize("text, words", [
    ("", ["got nothing"]),
    ([], ["an empty list"]),
    ("ImagNet:split=TRAIN:root=/x", ["unknown dataset 'ImagNet'", "did you mean ImageNet?"]),
    ("Nonsense:foo=1", ["unknown dataset 'Nonsense'", "LabelledFolder"]),
    ("ImageNet:split=TRAIN", ["root: missing"]),
    ("ImageNet:split=TRIAN:rot=/x", ["expected TRAIN, VAL, TEST, got TRIAN", "rot: unknown key", "root: missing"]),
    ("ImageNet:root=/x", ["split: expected TRAIN, VAL, TEST, got nothing"]),
    ("ImageDataset:root=", ["root: empty"]),
    ("ImageDataset", ["root: missing"]),
    ("ImageDataset:/my/images", ["cannot read ':/my/images'", 'double quotes']),
    ('ImageDataset:root="/a"b', ["cannot read"]),
    ("LabelledFolder:root=/a:root=/b", ["root: given more than once"]),
    ("s3://bucket/images", ["expected a folder on this machine", "download or mount"]),
    (["/a", "ImageNet:split=TRAIN:root=/x"], ["expected a list of image folders, got ImageNet in a list"]),
])  # fmt: skip
def test_mistakes_are_all_named(text, words):
    with pytest.raises(ConfigError) as e:
        parse_dataset(text)
    for word in ["train.dataset_path", *words]:
        assert word in str(e.value)
