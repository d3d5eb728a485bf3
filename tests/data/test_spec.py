"""Dataset strings and mappings: all spellings, quoting, paths that look like strings, and mistakes."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dinov2_custom.data.spec import DatasetSpec, Part, parse_dataset
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
    ("ImageDataset:root='/a:b':", folder("/a:b")),
    ("ImageFolder:root=/date=2020/k=v", folder("/date=2020/k=v")),
    ("ImageFolder:path=/x:path=/y", folder("/x", "/y")),
    ("/my/files.txt", DatasetSpec("ImageList", ("/my/files.txt",))),
    ("files.CSV", DatasetSpec("ImageList", ("files.CSV",))),
    ("ImageList:path=f.csv:column=image", DatasetSpec("ImageList", ("f.csv",), {"column": "image"})),
    ("ImageList:path=f.txt:root=/base/", DatasetSpec("ImageList", ("f.txt",), {"root": "/base"})),
    ("/my/s-{000..127}.tar", DatasetSpec("Tar", ("/my/s-{000..127}.tar",))),
    ("/my/s.tar.gz", DatasetSpec("Tar", ("/my/s.tar.gz",))),
    ("Tar:path=/my/shards", DatasetSpec("Tar", ("/my/shards",))),
    ("WebDataset:path=/a:path=/b", DatasetSpec("Tar", ("/a", "/b"))),
    ("WebDataset:root=/a", DatasetSpec("Tar", ("/a",))),
    (r"Tar:path=C:\s\a-{0..3}.tar:", DatasetSpec("Tar", (str(Path(r"C:\s\a-{0..3}.tar")),))),
    ("train-00000-of-00002.parquet", DatasetSpec("Parquet", ("train-00000-of-00002.parquet",))),
    ("Parquet:path=/p:column=img", DatasetSpec("Parquet", ("/p",), {"column": "img"})),
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


def test_existing_path_is_a_path(tmp_path, monkeypatch):
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
    ("ImagNet22k", ["unknown dataset 'ImagNet22k'", "did you mean ImageNet22k?"]),
    ("ImageList:path=f.csv:colum=x", ["colum: unknown key (there are path, column, root)"]),
    ("Tar:", ["path: missing (expected path=<folder>)"]),
    ({"path": "/a", "wieght": 1}, ["wieght: unknown key"]),
    ({"kind": "Tarr", "path": "/a"}, ["unknown dataset 'Tarr'", "did you mean Tar?"]),
    ({"weight": 1}, ["path: missing"]),
    ({"kind": "ImageNet", "root": "/a"}, ["split: expected TRAIN"]),
    ([{"path": "/a", "weight": 0}], ["weight: expected a number above 0, got 0"]),
    ([{"path": "/a", "weight": "much"}], ["weight: expected a number above 0, got 'much'"]),
    ([{"path": "/a", "weight": float("nan")}], ["weight: expected a number above 0"]),
    ([{"path": "/a", "weight": 1}, "/b", {"path": "/c"}], ["a weight for all or for none", "/b, /c"]),
    ([{"path": [{"path": "/a", "weight": 1}, {"path": "/b", "weight": 2}], "weight": 1}, {"path": "/c", "weight": 1}],
     ["weights inside of weights"]),
    (3, ["got 3"]),
    *((f"{kind}:split=TRAIN:root=/x:mode=PROTEIN_LOCALIZATION:wildcard=SEPARATE_CHANNELS",
       [f"{kind}, upstream's dataset of cell images", "ImageDataset, ImageFolder", "LabelledFolder, ImageNet"])
      for kind in ("HPAone", "HPAFoV", "CHAMMI_CP", "CHAMMI_HPA", "CHAMMI_WTC")),
    ("HPAone", ["HPAone, upstream's dataset of cell images"]),
    ({"kind": "CHAMMI_CP", "root": "/x"}, ["CHAMMI_CP, upstream's dataset of cell images"]),
    ("ImageNet:split=TRAIN:root=/x:mode=A:wildcard=SEPARATE_CHANNELS",
     ["mode: a key of upstream's cell images, which are not here (there are split, root, extra)", "wildcard: a key"]),
])  # fmt: skip
def test_mistakes_are_all_named(text, words):
    with pytest.raises(ConfigError) as e:
        parse_dataset(text)
    for word in ["train.dataset_path", *words]:
        assert word in str(e.value)


@pytest.mark.parametrize("mapping, text", [
    ({"path": "/my/images"}, "/my/images"),
    ({"root": "~/x", "weight": 3}, "~/x"),
    ({"path": "ImageNet:split=TRAIN:root=/i"}, "ImageNet:split=TRAIN:root=/i"),
    ({"kind": "ImageNet", "split": "TRAIN", "root": "/i", "extra": None}, "ImageNet:split=TRAIN:root=/i"),
    ({"kind": "ImageFolder", "path": "/a:b=c"}, 'ImageFolder:root="/a:b=c"'),
    ({"kind": "Tar", "path": ["/a", "/b"]}, "Tar:path=/a:path=/b"),
    ({"path": "f.csv", "column": "x:y"}, 'ImageList:path=f.csv:column="x:y"'),
    ({"path": "p.parquet", "column": "img"}, "Parquet:path=p.parquet:column=img"),
    ({"path": ["/a", "/b"]}, ["/a", "/b"]),
])  # fmt: skip
def test_mappings_are_equivalent_to_strings(mapping, text):
    assert parse_dataset(mapping) == parse_dataset(text) == parse_dataset(OmegaConf.create(mapping))


def test_lists_are_pooled_or_mixed():
    assert parse_dataset([{"path": "/a"}, {"path": "/b"}, "/c"]) == folder("/a", "/b", "/c")
    tar = DatasetSpec("Tar", ("/b.tar",))
    assert parse_dataset(["/a", "/b.tar"]) == DatasetSpec(
        "Mixture", parts=(Part(folder("/a"), None, "/a"), Part(tar, None, "/b.tar"))
    )
    weighted = [{"path": "/a", "weight": 0.7}, {"path": ["/c", "/b.tar"], "weight": 1, "name": "rest"}]
    for given in (weighted, OmegaConf.create(weighted)):
        spec = parse_dataset(given)
        assert [(part.weight, part.name) for part in spec.parts] == [(0.7, "/a"), (1, "rest")]
        assert spec.kind == spec.parts[1].spec.kind == "Mixture" and spec.parts[0].spec == folder("/a")
    assert parse_dataset([{"path": "/a", "weight": 2}]) == folder("/a")
    assert parse_dataset(["/a", "ImageNet:split=VAL:root=/i"]).parts[1].spec.kind == "ImageNet"


def test_folder_is_a_folder_regardless_of_its_name(tmp_path):
    for name in ("x.tar", "x.txt", "x.parquet"):
        (tmp_path / name).mkdir()
        assert parse_dataset(str(tmp_path / name)) == folder(str(tmp_path / name))
