"""Dataset definition files, and their images in pretraining."""

import json

import pytest
from PIL import Image

from dinov2_custom.data.definition import LabelSource, read_definition
from dinov2_custom.data.loaders import make_dataset
from dinov2_custom.errors import DataError


def _definition(folder):
    """Two images of COCO JSON, one of YOLO, one with a mask; one of them is in two sources."""
    for name in ("north/a.png", "north/b.png", "south/images/c.png", "south/images/v/v.png", "pixels/images/d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16)).save(folder / name)
    (folder / "pixels" / "masks").mkdir()
    images = [{"id": 2, "file_name": "b.png"}, {"id": 1, "file_name": "a.png"}]
    (folder / "north" / "t.json").write_text(json.dumps({"images": images}))
    (folder / "again.json").write_text(json.dumps({"images": [{"id": 5, "file_name": "../north/a.png"}]}))
    (folder / "list.txt").write_text("south/images/c.png\n\n")
    (folder / "yolo.yaml").write_text("names: [cell]\ntrain: list.txt\nval: south/images/v\n")
    (folder / "data.yaml").write_text(
        "classes: [cell]\n"
        "train:\n  - north/t.json\n  - {coco: again.json, images: pixels}\n  - yolo.yaml\n  - pixels\n"
        "val: [{yolo: yolo.yaml}]\n"
    )
    return folder / "data.yaml"


def test_sources_of_a_definition(tmp_path):
    definition = read_definition(_definition(tmp_path))
    assert definition.classes == ("cell",) and list(definition.parts) == ["train", "val"]
    at = str(tmp_path)
    assert definition.parts["train"] == (
        LabelSource("coco", f"{at}/north/t.json", f"{at}/north", "train"),
        LabelSource("coco", f"{at}/again.json", f"{at}/pixels", "train"),
        LabelSource("yolo", f"{at}/yolo.yaml", "", "train"),
        LabelSource("masks", f"{at}/pixels/masks", f"{at}/pixels/images", "train"),
    )


def test_pretraining_reads_every_image_once(tmp_path):
    file = _definition(tmp_path)
    dataset = make_dataset(dataset_str=str(file))
    names = [dataset.name(i).removeprefix(f"{tmp_path}/") for i in range(len(dataset))]
    assert names == ["north/b.png", "north/a.png", "south/images/c.png", "pixels/images/d.png"]
    assert [images for _, images, _ in dataset.shares()] == [2, 0, 1, 1]
    assert dataset[0][0].size == (24, 16) and dataset[0][1] == ()
    for other in (f"Definition:path={file}:part=val", {"path": str(file), "part": "val"}):
        assert len(make_dataset(dataset_str=other)) == 1
    assert len(make_dataset(dataset_str=[str(file), {"path": str(tmp_path / "yolo.yaml")}])) == 5
    with pytest.raises(DataError, match="part"):
        make_dataset(dataset_str=f"Definition:path={file}:part=test")


def test_digest_depends_on_the_images(tmp_path):
    file = _definition(tmp_path)
    before = make_dataset(dataset_str=str(file)).digest()
    assert make_dataset(dataset_str=str(file)).digest() == before
    images = [{"id": 2, "file_name": "b.png"}, {"id": 1, "file_name": "c.png"}]
    (tmp_path / "north" / "t.json").write_text(json.dumps({"images": images}))
    assert make_dataset(dataset_str=str(file)).digest() != before


def test_definition_files_with_faults(tmp_path):
    aliases = "a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(f"c{n}: &c{n} [*b, *b]\n" for n in range(5))
    for content, expected in {
        "classes: [a, a]\ntrain: a.json\n": "every name once",
        "train: a.json\n": "classes: expected a list",
        "classes: [a]\ntrain: {coco: a.json, masks: b}\n": "train, source 1",
        "classes: [a]\ntrain: []\n": "train: expected sources",
        "classes: [a]\n": "in train, val, test",
        "classes: [a]\ntrian: a.json\n": "trian: unknown key",
        "classes: [a\n": "expected YAML",
        "- a\n": "got a list",
        "names: [[a]]\ntrain: images\n": "names",
        aliases + "classes: *b\ntrain: *b\n": "classes: expected a list of names",
        "!!python/object/apply:os.getcwd []\n": "expected YAML",
    }.items():
        (tmp_path / "data.yaml").write_text(content)
        with pytest.raises(DataError) as found:
            read_definition(tmp_path / "data.yaml")
        assert expected in str(found.value), content
