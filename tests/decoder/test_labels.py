"""Reading and checking labels: COCO, YOLO, masks and definition files."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.decoder.instances import IGNORE, instance_mask, semantic_mask
from dinov2_custom.decoder.labels import read_split, read_train_and_val
from dinov2_custom.errors import DataError

WIDTH, HEIGHT = 40, 30


def _picture(path, size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(path)


def _annotation(number, image=7, category=3, box=(2, 3, 10, 8), **more):
    x, y, w, h = box
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    row = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": w * h, "iscrowd": 0}
    return {**row, "segmentation": outline, **more}


def _coco(folder, annotations, name="coco.json", **more):
    _picture(folder / "images" / "a.png")
    _picture(folder / "images" / "b.png", (20, 20))
    content = {
        "images": [
            {"id": 7, "file_name": "images/a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 2, "file_name": "images/b.png", "width": 20, "height": 20},
        ],
        "categories": [{"id": 3, "name": "cell"}, {"id": 90, "name": "parasite"}],
        "annotations": annotations,
        **more,
    }
    (folder / name).write_text(json.dumps(content))
    return folder / name


def _crowd(mask):
    """COCO's uncompressed run lengths, column by column."""
    runs, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def _faults(*args, **kwargs):
    with pytest.raises(DataError) as found:
        read_split(*args, **kwargs)
    return str(found.value)


def test_coco_with_a_crowd(tmp_path):
    crowd = np.zeros((HEIGHT, WIDTH), int)
    crowd[10:20, 5:9] = 1
    rows = [_annotation(1), _annotation(2, category=90, iscrowd=1, segmentation=_crowd(crowd), box=(5, 10, 4, 10))]
    split = read_split(_coco(tmp_path, rows), "instance")
    assert split.classes == ("cell", "parasite")
    first, second = split.images
    assert (first.path.name, first.width, first.height, second.instances) == ("a.png", WIDTH, HEIGHT, ())
    plain, group = first.instances
    assert (plain.category, plain.box, plain.area, plain.crowd) == (0, (2, 3, 10, 8), 80, False)
    assert group.crowd and group.category == 1
    assert np.array_equal(instance_mask(group, HEIGHT, WIDTH), crowd == 1)


def test_classes_given_set_the_order(tmp_path):
    split = read_split(_coco(tmp_path, [_annotation(1)]), "detection", classes=["parasite", "cell"])
    assert split.images[0].instances[0].category == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' decode
def test_run_lengths_and_polygons_equal_pycocotools(tmp_path):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools (the extra decoder) decodes masks")
    masks = np.random.default_rng(0).random((12, HEIGHT, WIDTH)) < np.linspace(0.02, 0.98, 12)[:, None, None]
    masks[0, 0, 0], masks[1] = True, True  # a first run of no pixels; everything set
    rows = []
    for number, mask in enumerate(masks, start=1):
        text = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        rows.append(_annotation(number, segmentation={"size": [HEIGHT, WIDTH], "counts": text}))
    rows.append(_annotation(99, segmentation=[[1.5, 2.2, 30.1, 4, 22, 28.9], [0, 0, 5, 0, 5, 5]]))
    found = read_split(_coco(tmp_path, rows), "instance").images[0].instances
    for mask, instance in zip(masks, found, strict=False):
        assert np.array_equal(instance_mask(instance, HEIGHT, WIDTH), mask)
    theirs = coco.decode(coco.merge(coco.frPyObjects(rows[-1]["segmentation"], HEIGHT, WIDTH)))
    assert np.array_equal(instance_mask(found[-1], HEIGHT, WIDTH), theirs == 1)


BAD = {
    "outside": {"bbox": [35, 3, 10, 8]},
    "negative": {"bbox": [-4, 3, 10, 8]},
    "zero area": {"bbox": [2, 3, 0, 8]},
    "infinite": {"bbox": [2, 3, float("inf"), 8]},
    "text for a box": {"bbox": "2 3 10 8"},
    "unknown class": {"category_id": 12},
    "unknown image": {"image_id": 1000},
    "list as id of an image": {"image_id": [7]},
    "size of run lengths": {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [WIDTH * HEIGHT - 1, 1]}},
    "sum of run lengths": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, WIDTH * HEIGHT + 1]}},
    "negative run": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT + 5, -5]}},
    "no pixels": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT]}},
    "text of run lengths": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "P~~~~~~~~~~~~~~~0"}},
    "cut text": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "P"}},
    "two points": {"segmentation": [[1, 1, 5, 5]]},
    "odd polygon": {"segmentation": [[1, 1, 5, 5, 2, 9, 3]]},
    "line": {"segmentation": [[1, 1, 5, 5, 9, 9]]},
    "point far outside": {"segmentation": [[1, 1, 1e9, 5, 9, 9]]},
    "no outline": {"segmentation": []},
}


def test_all_faults_at_once_with_their_ids(tmp_path):
    rows = [_annotation(100 + number, **bad) for number, bad in enumerate(BAD.values())]
    file = _coco(tmp_path, rows)
    text = _faults(file, "instance")
    missed = [name for number, name in enumerate(BAD) if f"{file} annotation {100 + number}: expected" not in text]
    assert missed == [] and f"{len(BAD)} faults" in text


def test_faults_of_train_and_val_are_one_error(tmp_path):
    train, val = (_coco(tmp_path / name, [_annotation(5, category=9)]) for name in "ab")
    good = _coco(tmp_path / "good", [_annotation(5)])
    for pair in ((train, val), (train, good), (good, val)):
        with pytest.raises(DataError) as found:
            read_train_and_val(*pair, "detection")
        assert [f"{file} annotation 5" in str(found.value) for file in (train, val, good)] == [
            train in pair, val in pair, False
        ]  # fmt: skip


def test_many_faults_are_counted(tmp_path):
    text = _faults(_coco(tmp_path, [_annotation(number, category=5) for number in range(500)]), "detection")
    assert "500 faults" in text and "480 more" in text and len(text.splitlines()) < 30


def test_faults_of_coco_images_and_ids(tmp_path):
    images = [
        {"id": 1, "file_name": "images/a.png", "width": HEIGHT, "height": WIDTH},
        {"id": 2, "file_name": "images/gone.png"},
        {"id": 3, "file_name": "images/text.png"},
        {"id": 4, "file_name": "images/b.png"},
        {"id": 4, "file_name": "images/b.png"},
        {"id": 5},
    ]
    file = _coco(tmp_path, [_annotation(1, 4), _annotation(1, 4)], images=images)
    (tmp_path / "images" / "text.png").write_text("no image")
    text = _faults(file, "detection")
    for expected in ("image 1: expected the size", "image 2: ", "image 3: ", "image 4: its id", "images[5]"):
        assert f"{file} {expected}" in text or f"{file}: {expected}" in text
    assert f"{file} annotation 1: its id is there twice" in text


def test_rounding_is_clipped_and_reported(tmp_path, caplog):
    rows = [_annotation(1, box=(30.5, 22, 10, 8)), _annotation(2, box=(-0.4, 0, 5, 5)), _annotation(3)]
    with caplog.at_level("INFO", "dinov2"):
        found = read_split(_coco(tmp_path, rows), "instance").images[0].instances
    assert found[0].box == (30.5, 22, 9.5, 8) and found[1].box == pytest.approx((0, 0, 4.6, 5))
    assert max(found[0].segmentation[0][::2]) == WIDTH
    assert "4 boxes or outlines" in caplog.text


def test_semantic_masks_of_instances(tmp_path):
    pytest.importorskip("pycocotools.mask", reason="pycocotools (the extra decoder) draws polygons")
    rows = [_annotation(1, box=(2, 3, 4, 4)), _annotation(2, category=90, box=(0, 0, 20, 20))]
    split = read_split(_coco(tmp_path, rows), "semantic")
    assert split.classes == ("cell", "parasite", "background")
    mask = semantic_mask(split.images[0], 3)
    assert mask.dtype == np.uint8 and mask.shape == (HEIGHT, WIDTH)
    assert (mask[4, 4], mask[15, 15], mask[25, 30]) == (0, 1, 2)  # the smaller on top
    again = read_split(_coco(tmp_path, rows), "semantic", classes=["background", "parasite", "cell"])
    assert semantic_mask(again.images[0], 3)[[4, 15, 25], [4, 15, 30]].tolist() == [2, 1, 0]


def _yolo(folder, labels, yaml="names: [cell, parasite]\ntrain: images/train\nval: images/val\n"):
    for name, lines in labels.items():
        _picture(folder / "images" / f"{name}.png")
        (folder / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "labels" / f"{name}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(yaml)
    return folder / "data.yaml"


def test_yolo_boxes_and_polygons(tmp_path):
    file = _yolo(tmp_path, {"train/a": ["1 0.5 0.5 0.25 0.2"], "val/b": ["0 0.1 0.1 0.5 0.1 0.5 0.5"]})
    split = read_split(file, "detection")
    assert split.classes == ("cell", "parasite") and [image.path.name for image in split.images] == ["a.png"]
    only = split.images[0].instances[0]
    assert only.category == 1 and only.box == pytest.approx((15, 12, 10, 6)) and only.area == pytest.approx(60)
    only = read_split(tmp_path, "instance", "val").images[0].instances[0]  # a folder with one YAML
    assert only.box == pytest.approx((4, 3, 16, 12)) and only.area == pytest.approx(96)


def test_yolo_paths_of_exports_beside_the_yaml(tmp_path):
    names = "names: {0: cell}\ntrain: ../images/train\nvalid: ../images/val\n"
    file = _yolo(tmp_path / "export", {"train/a": ["0 .5 .5 .2 .2"], "val/b": ["0 .5 .5 .2 .2"]}, names)
    assert len(read_split(file, "detection", "val").images) == 1


def test_faults_of_yolo_name_the_line(tmp_path):
    lines = ["0 .5 .5 .2 .2", "", "0 .5 .5 .2", "7 .5 .5 .2 .2", "0 120 40 20 20", "0 .9 .5 .8 .2", "0 .5 .5 0 .2"]
    lines += ["one .5 .5 .2 .2", "0 nan .5 .2 .2", "0 .1 .1 .2 .2 .3 .3 .9", "0.5 .5 .5 .2 .2"]
    file = _yolo(tmp_path, {"train/a": lines, "train/c": ['{"images": []}']})
    _picture(tmp_path / "images" / "train" / "without_labels.png")
    (tmp_path / "labels" / "train" / "without_image.txt").write_text("0 .5 .5 .2 .2")
    text = _faults(file, "detection")
    label = tmp_path / "labels" / "train" / "a.txt"
    assert [number for number in range(1, 12) if f"{label} line {number}: " in text] == [*range(3, 12)]
    assert f"{tmp_path / 'labels' / 'train' / 'c.txt'} line 1" in text and "without_image.txt" in text
    assert "without_labels" not in text
    assert "labels/train/a.txt line 1: expected an outline" in _faults(file, "instance").replace("\\", "/")


@pytest.mark.parametrize("task", ["detection", "semantic"])
def test_files_of_another_format(tmp_path, task):
    coco = _coco(tmp_path, [_annotation(1)])
    yaml = _yolo(tmp_path / "yolo", {"train/a": ["0 .5 .5 .2 .2"]})
    (tmp_path / "data.yaml").write_text(
        f"classes: [cell]\ntrain:\n  - {{yolo: {coco}}}\n  - {{coco: {yaml}}}\n  - {{coco: none.json}}\n"
    )
    text = _faults(tmp_path / "data.yaml", task)
    assert "3 faults" in text and "expected YOLO's YAML, got JSON" in text and "expected COCO JSON" in text


def test_an_empty_split(tmp_path):
    assert "without any" in _faults(_coco(tmp_path, []), "detection")
    assert "empty split" in _faults(_coco(tmp_path, [], images=[]), "detection")


def _masks(folder, values, names=("a", "b")):
    for name, value in zip(names, values, strict=False):
        _picture(folder / "images" / f"{name}.jpg", value.shape[::-1])
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(value).save(folder / "masks" / f"{name}.png")
    return folder


def test_folders_of_masks(tmp_path):
    value = np.zeros((HEIGHT, WIDTH), np.uint8)
    value[:5], value[5:9] = 1, IGNORE
    split = read_split(_masks(tmp_path, [value]), "semantic", classes=["tissue", "tumour"])
    assert split.classes == ("tissue", "tumour") and split.images[0].instances == ()
    assert np.array_equal(semantic_mask(split.images[0], 2), value)
    split.images[0].mask.write_bytes(b"")
    with pytest.raises(DataError):
        semantic_mask(split.images[0], 2)


def test_faults_of_masks(tmp_path):
    good = np.zeros((HEIGHT, WIDTH), np.uint8)
    names = ("beyond", "colour", "size", "maskless", "deep")
    deep = good.astype(np.uint16) + 300
    _masks(tmp_path, [good + 2, np.stack([good] * 3, 2)[:, :, 0], good, good, deep], names)
    Image.fromarray(np.stack([good] * 3, 2)).save(tmp_path / "masks" / "colour.png")
    _picture(tmp_path / "images" / "size.jpg", (WIDTH, HEIGHT + 1))
    (tmp_path / "masks" / "maskless.png").rename(tmp_path / "masks" / "imageless.png")
    text = _faults(tmp_path, "semantic", classes=["one", "two"])
    for name in (*names, "imageless"):
        assert name in text
    assert "6 faults" in text
    assert "COCO or YOLO" in _faults(tmp_path, "detection", classes=["one"])


@pytest.mark.parametrize("task, kind", [("detection", "coco"), ("semantic", "coco"), ("semantic", "masks")])
def test_missing_class_names_are_a_single_fault(tmp_path, task, kind):
    if kind == "coco":
        source = _coco(tmp_path, [_annotation(1), _annotation(2, category=90)], categories=[])
    else:
        source = _masks(tmp_path, [np.ones((HEIGHT, WIDTH), np.uint8)] * 2)
    text = _faults(source, task)
    assert "got 1 fault:" in text and "expected class names" in text, text


def _bomb(path):
    """A PNG of 300 bytes whose header states 10 gigapixels."""
    Image.new("L", (8, 8)).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def test_bombs_are_faults(tmp_path):
    good = np.zeros((HEIGHT, WIDTH), np.uint8)
    _masks(tmp_path, [good, good])
    _bomb(tmp_path / "masks" / "a.png")
    _bomb(tmp_path / "images" / "b.jpg")
    text = _faults(tmp_path, "semantic", classes=["one"])
    assert "2 faults" in text and text.count("expected fewer pixels") == 2


def _definition(folder):
    _coco(folder / "north", [_annotation(1)])
    _yolo(folder / "south", {"train/a": ["1 .5 .5 .2 .2"], "val/b": ["0 .5 .5 .2 .2"]})
    (folder / "data.yaml").write_text(
        "classes: [parasite, cell]\n"
        "train:\n  - {coco: north/coco.json, images: north}\n  - south/data.yaml\n"
        "val: {yolo: south/data.yaml}\n"
    )
    return folder / "data.yaml"


def test_definition_file(tmp_path):
    split = read_split(_definition(tmp_path), "detection")
    assert split.classes == ("parasite", "cell")
    assert [[one.category for one in image.instances] for image in split.images] == [[1], [], [0]]
    assert [image.path.name for image in read_split(tmp_path / "data.yaml", "detection", "val").images] == ["b.png"]
    assert "expected test" in _faults(tmp_path / "data.yaml", "detection", "test")
