"""Label files that are broken or made to do harm: each is one listed fault, never a crash, a hang or a flood."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from dinov2_custom.decoder.labels import read_split
from dinov2_custom.errors import DataError
from tests.decoder.test_labels import HEIGHT, WIDTH, _annotation, _coco, _masks, _yolo

DEEP = "[" * 5_000 + "]" * 5_000
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


def refusal(*args, **kwargs):
    with pytest.raises(DataError) as found:
        read_split(*args, **kwargs)
    text = str(found.value)
    assert len(text) < 20_000 and text.replace("\n", "").isprintable()
    return text


ANNOTATIONS = {
    "not a number": {"bbox": [2, 3, float("nan"), 8]},
    "numbers of 300 digits": {"bbox": [2, 3, 10**300, 10**300]},
    "numbers above floats": {"bbox": [10**400, 3, 10, 8]},
    "nested box": {"bbox": [[2], 3, 10, 8]},
    "box of booleans": {"bbox": [True, True, True, True]},
    "box of text": {"bbox": ["2", "x", "10", "8"]},
    "box is an object": {"bbox": {"x": 1}},
    "crowd is text": {"iscrowd": "no"},
    "crowd is a list": {"iscrowd": [1]},
    "polygon of text": {"segmentation": [["a"] * 6]},
    "polygon of lists": {"segmentation": [[[1, 1], [5, 5], [9, 1]]]},
    "polygon not a number": {"segmentation": [[1, 1, float("nan"), 5, 9, 9]]},
    "polygon of huge numbers": {"segmentation": [[1, 1, 10**400, 5, 9, 9]]},
    "polygon and run lengths": {"segmentation": [{"size": [HEIGHT, WIDTH], "counts": [1]}]},
    "run lengths of terabytes": {"segmentation": {"size": [10**7, 10**7], "counts": [0, 10**14]}},
    "run of terabytes": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 10**14]}},
    "runs are booleans": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [True] * (WIDTH * HEIGHT)}},
    "runs are floats": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0.0, float(WIDTH * HEIGHT)]}},
    "runs are nested": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [[0, WIDTH * HEIGHT]]}},
    "runs are missing": {"segmentation": {"size": [HEIGHT, WIDTH]}},
    "size is missing": {"segmentation": {"counts": [0, WIDTH * HEIGHT]}},
    "text of runs without end": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "o" * 100_000}},
    "text of negative runs": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "@" * 100}},
    "text in another alphabet": {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "日本"}},
    "class is a list": {"category_id": [3]},
    "class is true": {"category_id": True},
    "class is text": {"category_id": "3"},
    "image is an object": {"image_id": {"id": 7}},
}


def test_annotations(tmp_path):
    file = _coco(tmp_path, [])
    content = json.loads(file.read_text())
    missed = []
    for name, bad in ANNOTATIONS.items():
        file.write_text(json.dumps(content | {"annotations": [_annotation(100, **bad)]}))
        text = refusal(file, "instance")
        if "1 fault:" not in text or f"{file} annotation 100: expected" not in text:
            missed.append(f"{name}: {text}")
    assert missed == []


def test_ids_and_class_names_do_not_reach_the_terminal_as_they_are(tmp_path):
    names = ["\x1b[2J", "a\nb: no fault", "\ud800", "x" * 1_000_000, "日本"]
    rows = [_annotation(name, category=name) for name in names]
    text = refusal(_coco(tmp_path, rows), "detection")
    assert "5 faults" in text and "日本" in text and "\\x1b[2J" in text and "a\\nb" in text


def test_image_names(tmp_path):
    """They may lead out of the folder, as those of some tools do, but only to images."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:20])
    names = ["../../../../../../etc/passwd", "/etc/passwd", "/dev/zero", "pipe", "loop", "empty.png", "cut.png"]
    names += [".", "", "a\0b", "\ud800.png", "x" * 100_000, "images/a.png/b.png"]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    text = refusal(_coco(tmp_path, [], images=images), "detection")
    assert f"{len(names)} faults" in text and "root:" not in text


JSON = {
    "empty": b"",
    "zeros": b"\0" * 100,
    "UTF-16": '{"images": []}'.encode("utf-16"),
    "not UTF-8": b'{"images": "\xff"}',
    "deep": DEEP.encode(),
    "deep inside": b'{"annotations": [], "categories": [], "images": ' + DEEP.encode() + b"}",
    "cut": b'{"images": [{"id": 1',
    "twice": b'{"images": [], "annotations": [], "categories": [], "images": []}',
    "digits": b'{"images": [], "annotations": [], "categories": [], "x": ' + b"9" * 5_000 + b"}",
    "list": b"[1, 2]",
    "keys are objects": b'{"images": {"1": {}}, "annotations": {}, "categories": {}}',
    "rows are text": b'{"images": ["a"], "annotations": ["a"], "categories": ["a"]}',
    "ids are null": b'{"images": [{"id": null, "file_name": "a"}], "annotations": [], "categories": [{"name": "a"}]}',
}


def test_coco_files(tmp_path):
    for name, content in JSON.items():
        (tmp_path / "a.json").write_bytes(content)
        for task in ("detection", "semantic"):
            text = refusal(tmp_path / "a.json", task)
            assert str(tmp_path / "a.json") in text, name
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("loop.json", "pipe.json", "none.json"):
        assert "expected a file" in refusal(tmp_path / name, "detection")


YAML = {
    "empty": b"",
    "zeros": b"\0" * 100,
    "UTF-16": "classes: [a]".encode("utf-16-be"),
    "deep": b"classes: " + DEEP.encode(),
    "aliases": ALIASES.encode() + b"classes: *h\ntrain: *h\n",
    "aliases as a source": ALIASES.encode() + b"classes: [a]\ntrain: {coco: *h}\n",
    "objects": b"!!python/object/apply:os.system ['true']",
    "twice": b"classes: [a]\ntrain: {yolo: a.yaml}\ntrain: {yolo: b.yaml}\n",
    "class twice": b"classes: [a, a]\ntrain: {yolo: a.yaml}\n",
    "merged": b"x: &x {yolo: a.yaml}\nclasses: [a]\ntrain: {<<: *x, coco: b.json}\n",
    "classes are text": b"classes: cell\ntrain: {yolo: a.yaml}\n",
    "names are nested": b"names: [[a]]\ntrain: images\n",
    "names are negative": b"names: {-1: a}\ntrain: images\n",
    "path is a list": b"names: [a]\npath: [b]\ntrain: images\n",
    "places are numbers": b"names: [a]\ntrain: [1, 2]\n",
    "part is nothing": b"classes: [a]\ntrain: []\n",
    "source is nothing": b"classes: [a]\ntrain: [null]\n",
    "zero in a path": b'classes: [a]\ntrain: {coco: "a\\0b.json"}\n',
    "zero in a place": b'names: [a]\ntrain: "a\\0b"\n',
    "loop of itself": b"classes: [a]\ntrain: {yolo: data.yaml}\n",
}


def test_definition_and_yolo_files(tmp_path):
    for name, content in YAML.items():
        (tmp_path / "data.yaml").write_bytes(content)
        text = refusal(tmp_path / "data.yaml", "detection")
        assert str(tmp_path) in text or "train" in text, name
        assert "twice" not in name or "twice" in text or "every name once" in text


LINES = ["nan .5 .5 .2 .2", "0 inf .5 .2 .2", "1e300 .5 .5 .2 .2", "-1 .5 .5 .2 .2", f"{'9' * 400} .5 .5 .2 .2"]
LINES += ["0 -.5 .5 .2 .2", "0 .5 .5 -.2 .2", "0 .5 .5 1e-320 .2", "0 .1 .1 .5 .1", "0 .1 .1 .5 .5 .9", "\x1b[2J", "०"]
LINES += ["0 " + ".5 " * 100_001, "0 .1 .1 .5 .5 .9 .9", "<xml/>", "0,.5,.5,.2,.2", "0 .5 .5 .2 .2\0"]


def test_yolo_labels(tmp_path):
    text = refusal(_yolo(tmp_path, {"train/a": LINES}), "instance")
    label = tmp_path / "labels" / "train" / "a.txt"
    assert [n for n in range(1, len(LINES) + 1) if f"{label} line {n}: " not in text] == []
    for content in (b"\xff\xfe0\0", b"\0" * 10):
        label.write_bytes(content)
        assert str(label) in refusal(tmp_path / "data.yaml", "detection")
    label.unlink()
    label.symlink_to(label)
    (tmp_path / "labels" / "train" / "b.txt").mkdir()
    assert "label" in refusal(tmp_path / "data.yaml", "detection")
    (tmp_path / "list.txt").write_text("/etc/passwd\n/dev/zero\nimages/train/a.png\n../a\0b\n")
    (tmp_path / "data.yaml").write_text("names: [cell]\ntrain: list.txt\n")
    assert "root:" not in refusal(tmp_path / "data.yaml", "detection")


def test_masks(tmp_path):
    good = np.zeros((HEIGHT, WIDTH), np.uint8)
    names = ("cut", "empty", "zeros", "text", "float", "alpha", "pipe")
    folder = _masks(tmp_path, [good] * len(names), names)
    masks = folder / "masks"
    Image.fromarray(np.random.default_rng(0).integers(0, 2, good.shape, np.uint8)).save(masks / "cut.png")
    (masks / "cut.png").write_bytes((masks / "cut.png").read_bytes()[:120])
    (masks / "empty.png").write_bytes(b"")
    (masks / "zeros.png").write_bytes(b"\0" * 500)
    (masks / "text.png").write_text("mask")
    Image.fromarray(good.astype(np.float32)).save(masks / "float.png", "TIFF")
    Image.new("RGBA", (WIDTH, HEIGHT)).save(masks / "alpha.png")
    (masks / "pipe.png").unlink()
    os.mkfifo(masks / "pipe.png")
    (masks / "loop").symlink_to(masks, target_is_directory=True)
    text = refusal(folder, "semantic", classes=["a", "b"])
    assert [name for name in names if f"{name}.png" not in text and f"{name}.jpg" not in text] == []
