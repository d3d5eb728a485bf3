"""Average precision, mean IoU, and intervals of differences."""

from pathlib import Path

import numpy as np
import pytest

from dinov2_custom.decoder.instances import IGNORE, Instance, LabelledImage, Split
from dinov2_custom.decoder.measures import coco_scores, confusion, mean_iou, paired_interval
from dinov2_custom.errors import DataError

needs_pycocotools = pytest.mark.usefixtures("pycocotools")
SIZE = 64


@pytest.fixture
def pycocotools():
    pytest.importorskip("pycocotools", reason="pycocotools (the extra decoder) computes average precision")


def _split(num_images=20, seed=0):
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        found = []
        for number in range(4):
            x, y = generator.uniform(0, 40, 2).tolist()
            w, h = generator.uniform(8, 24, 2).tolist()
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            found.append(Instance(number % 2, (x, y, w, h), outline, w * h, number == 3))
        images.append(LabelledImage(Path("a.png"), SIZE, SIZE, tuple(found), None))
    return Split(("cell", "parasite", "never"), tuple(images))


def _predictions(split, noise, seed=1):
    generator = np.random.default_rng(seed)
    rows = []
    for at, image in enumerate(split.images):
        for one in image.instances:
            x, y, w, h = (np.array(one.box) + generator.normal(0, noise, 4)).tolist()
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            row = {"image_id": at, "category_id": one.category, "bbox": [x, y, w, h], "segmentation": outline}
            rows.append(row | {"score": float(generator.random())})
    return rows


@needs_pycocotools
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_scores(kind, capsys):
    split = _split()
    perfect = coco_scores(split, _predictions(split, 0), kind)
    assert (perfect["ap"], perfect["ap50"], perfect["ap75"], perfect["ap_large"]) == (1, 1, 1, None)
    assert perfect["per_class"] == [1, 1, None]
    worse = coco_scores(split, _predictions(split, 2), kind)
    assert 0 < worse["ap"] < worse["ap50"] < 1
    assert coco_scores(split, [], kind)["ap50"] == 0
    assert capsys.readouterr().out == ""


@needs_pycocotools
def test_unknown_image(capsys):
    with pytest.raises(DataError, match="prediction 1"):
        coco_scores(_split(2), [{"image_id": 2, "category_id": 0, "bbox": [0, 0, 5, 5], "score": 0.5}], "bbox")


@needs_pycocotools
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_interval_of_ap50(kind):
    split = _split()
    good, bad = _predictions(split, 1.5), _predictions(split, 4, seed=2)
    difference, low, high = paired_interval(split, good, bad, kind, seed=0)
    expected = coco_scores(split, good, kind)["ap50"] - coco_scores(split, bad, kind)["ap50"]
    assert difference == pytest.approx(expected, abs=1e-9)
    assert 0 < low < difference < high < 1
    assert paired_interval(split, good, bad, kind, seed=0) == (difference, low, high)
    assert paired_interval(split, good, good, kind, seed=0) == (0, 0, 0)


@needs_pycocotools
def test_ap50_of_a_resample_equals_pycocotools():
    from dinov2_custom.decoder.measures import _weighted_ap50

    split = _split(12)
    rows = _predictions(split, 3)
    weights = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=3)
    found = _weighted_ap50(split, rows, "bbox", weights)
    for some, score in zip(weights, found, strict=True):
        chosen = np.repeat(np.arange(12), some)
        resampled = Split(split.classes, tuple(split.images[at] for at in chosen))
        again = [{**row, "image_id": to} for to, at in enumerate(chosen) for row in rows if row["image_id"] == at]
        # detections of the copies of an image have equal scores, which pycocotools takes one by one
        assert score == pytest.approx(coco_scores(resampled, again, "bbox")["ap50"], abs=0.02)


def test_mean_iou():
    target = np.array([[0, 0, 1], [1, IGNORE, 2]])
    pred = np.array([[0, 1, 1], [1, 0, 2]])
    table = confusion(pred, target, 4)
    assert table.sum() == 5 and table[0].tolist() == [1, 1, 0, 0]
    assert mean_iou(table) == {"miou": pytest.approx((1 / 2 + 2 / 3 + 1) / 3), "per_class": [0.5, 2 / 3, 1.0, None]}
    with pytest.raises(ValueError, match="shape"):
        confusion(pred[:1], target, 4)


def test_interval_of_mean_iou():
    generator = np.random.default_rng(0)
    split = Split(("a", "b"), tuple(LabelledImage(Path("a"), 8, 8, (), Path("m")) for _ in range(30)))
    tables = []
    for errors in (0.1, 0.4):
        targets = generator.integers(0, 2, (30, 8, 8))
        wrong = generator.random((30, 8, 8)) < errors
        tables.append([confusion(np.where(w, 1 - t, t), t, 2) for t, w in zip(targets, wrong, strict=True)])
    difference, low, high = paired_interval(split, *tables, "semantic", seed=1)
    assert difference == pytest.approx(mean_iou(sum(tables[0]))["miou"] - mean_iou(sum(tables[1]))["miou"])
    assert 0 < low < difference < high
